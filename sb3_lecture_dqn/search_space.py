"""What Optuna searches for LectureDQN: the hyperparameters that decide whether this algorithm learns."""

import ast
from typing import Any

import optuna
from stable_baselines3.common.utils import LinearSchedule

#: Widths of the two hidden layers; the lecture's is 256 (L6).
WIDTHS = (64, 128, 256, 512)
BATCH_SIZES = (32, 64, 128, 256, 512)
TRAIN_FREQS = (1, 4, 16, 64, 256)
#: Gradient steps for each step of all environments together.
UPDATE_RATIOS = (0.25, 0.5, 1.0, 2.0)
BUFFER_SIZES = (10_000, 50_000, 100_000, 200_000)


def sample_lecture_dqn_params(
    trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
) -> dict[str, Any]:
    """
    Draw the constructor's arguments for one trial, as rl_zoo3's samplers do.

    :param trial: The Optuna trial
    :param n_actions: Without effect (rl_zoo3 passes the size of a continuous action)
    :param n_envs: Without effect
    :param additional_args: rl_zoo3's ``using_her_replay_buffer`` and ``her_kwargs``
    :return: Arguments of ``LectureDQN``
    """
    trial.suggest_float("learning_rate", 5e-5, 5e-3, log=True)
    trial.suggest_categorical("learning_rate_schedule", ["constant", "linear"])
    trial.suggest_categorical("batch_size", BATCH_SIZES)
    trial.suggest_categorical("buffer_size", BUFFER_SIZES)
    trial.suggest_int("learning_starts", 100, 5_000, log=True)
    trial.suggest_float("one_minus_gamma", 1e-3, 5e-2, log=True)
    trial.suggest_categorical("train_freq", TRAIN_FREQS)
    trial.suggest_categorical("update_ratio", UPDATE_RATIOS)
    trial.suggest_int("target_update_interval", 10, 5_000, log=True)
    trial.suggest_float("exploration_fraction", 0.01, 0.5, log=True)
    trial.suggest_float("exploration_final_eps", 0.005, 0.2, log=True)
    trial.suggest_categorical("width", WIDTHS)

    hyperparams = convert_lecture_dqn_params(trial.params)
    for name in ("gamma", "gradient_steps", "learning_rate"):
        trial.set_user_attr(name, hyperparams[name])
    if additional_args.get("using_her_replay_buffer"):
        hyperparams["replay_buffer_kwargs"] = dict(additional_args.get("her_kwargs", {}))
    if isinstance(hyperparams["learning_rate"], str):
        hyperparams["learning_rate"] = LinearSchedule(trial.params["learning_rate"], 0.0, 1.0)
    return hyperparams


def convert_lecture_dqn_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn what a trial drew into what a hyperparameter file says.

    :param sampled_params: ``trial.params`` of a trial of :func:`sample_lecture_dqn_params`
    :return: Hyperparameters in the notation of rl_zoo3's yml files
    """
    params = dict(sampled_params)
    learning_rate = params.pop("learning_rate")
    is_linear = params.pop("learning_rate_schedule") == "linear"
    train_freq = params["train_freq"]
    return {
        "learning_rate": f"lin_{learning_rate}" if is_linear else learning_rate,
        "gamma": 1 - params.pop("one_minus_gamma"),
        "gradient_steps": max(round(train_freq * params.pop("update_ratio")), 1),
        "policy_kwargs": {"net_arch": [params.pop("width")] * 2},
        **params,
    }


def merge_policy_kwargs(of_entry: Any, of_trial: dict[str, Any]) -> Any:
    """
    Put what a trial drew into the ``policy_kwargs`` of the entry that its search started from; the rest of them stays.

    :param of_entry: The entry's: a dictionary, Python code that makes one (as in rl_zoo3's yml files), or ``None``
    :param of_trial: The trial's
    :return: A dictionary, or code if the entry's are code, which may name classes that a yml file cannot hold
    """
    if not isinstance(of_entry, str):
        return {**(of_entry or {}), **of_trial}
    drawn = [ast.keyword(name, ast.parse(repr(value), mode="eval").body) for name, value in of_trial.items()]
    call = ast.parse(of_entry.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "dict":
        call = ast.Call(ast.Name("dict"), [call], [])
    call.keywords = [keyword for keyword in call.keywords if keyword.arg not in of_trial] + drawn
    return ast.unparse(call)

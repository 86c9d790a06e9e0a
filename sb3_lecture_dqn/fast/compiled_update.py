"""The fast update on the CPU with what lies between the matrix products compiled (:mod:`sb3_lecture_dqn.fast.kernels`)."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch as th

from sb3_lecture_dqn.fast import kernels
from sb3_lecture_dqn.fast.adam import FlatAdam
from sb3_lecture_dqn.fast.compiled_head import CompiledHead, KeptLayer, Workspace, is_compilable
from sb3_lecture_dqn.fast.head import read_head
from sb3_lecture_dqn.fast.products import inputs_gradient
from sb3_lecture_dqn.fast.second_thread import Task, Work, wait_for_all
from sb3_lecture_dqn.fast.update import FastUpdate
from sb3_lecture_dqn.policies import LectureDQNPolicy

#: More parameters are work for several threads, which the kernels do not use.
MOST_PARAMETERS = 2**20


class CompiledAdam(FlatAdam):
    """
    The same as :class:`FlatAdam`, by a kernel of ours.

    :param optimizer: As for :class:`FlatAdam`
    :param theta: As for :class:`FlatAdam`
    :param gradient: As for :class:`FlatAdam`
    """

    def __init__(self, optimizer: th.optim.Adam, theta: th.Tensor, gradient: th.Tensor) -> None:
        super().__init__(optimizer, theta, gradient)
        self._arrays = (theta.numpy(), gradient.numpy(), self.first_moment.numpy(), self.second_moment.numpy())

    def step(self) -> None:
        """One step of Adam."""
        self.step_counts += 1
        group, count = self.optimizer.param_groups[0], self.step_count.item()
        beta_1, beta_2 = group["betas"]
        step_size, root_correction = group["lr"] / (1 - beta_1**count), (1 - beta_2**count) ** -0.5
        number = self._arrays[0].dtype.type
        kernels.adam_step(
            *self._arrays,
            number(1 - beta_1),
            number(beta_2),
            number(1 - beta_2),
            number(step_size),
            number(root_correction),
            number(group["eps"]),
        )


class CompiledUpdate(FastUpdate):
    """
    The update for one policy on the CPU.

    Work that is large enough for several threads is left to :class:`FastUpdate`.

    :param policy: The policy, for which :meth:`fits` holds; its parameters become views of flat tensors
    :param optimizer: Its optimizer
    """

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam) -> None:
        super().__init__(policy, optimizer)
        self.compiled_head, self.compiled_target = CompiledHead.of(self.head), CompiledHead.of(self.target_head)
        self.compiled_gradients, self._flat_gradient = CompiledHead.of(self.head_gradients), self.gradient.numpy()
        self._workspaces: list[Workspace] = []

    @staticmethod
    def fits(policy: LectureDQNPolicy) -> bool:
        """
        Whether the kernels compute what a policy's networks do.

        :param policy: The policy
        :return: Whether both have hidden layers, each with a LayerNorm, and Numba compiles
        """
        return all(is_compilable(read_head(q_net)) for q_net in (policy.q_net, policy.q_net_target))

    def _make_adam(self, optimizer: th.optim.Adam) -> FlatAdam:
        return (CompiledAdam if self._is_for_one_thread else FlatAdam)(optimizer, self.theta, self.gradient)

    @property
    def _is_for_one_thread(self) -> bool:
        return self.theta.numel() <= MOST_PARAMETERS

    def _q_values(self, features: th.Tensor) -> th.Tensor:
        takes_them = self.compiled_target.takes(features)
        return self.compiled_target.q_values(features) if takes_them else super()._q_values(features)

    def _selections(self, actions: th.Tensor, batch_size: int) -> th.Tensor:
        """The actions themselves: a kernel looks for their Q values."""
        return actions

    def _head_gradients_of(
        self, features: th.Tensor, selection: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        if not self.compiled_head.takes(features) or features.size(0) != selection.size(0):
            return self._head_gradients_by_pytorch(features, selection, batch_targets)
        kept = self.compiled_head.forward_for_backward(features, self._workspaces_for(features.size(0)))
        q_values = self.compiled_head.final_layer(kept[-1].activations)
        targets = batch_targets()
        if targets.shape != selection.shape:
            return self._head_gradients_by_pytorch(features, selection, lambda: targets)
        gradient = self._final_layer_gradients(kept[-1].activations, q_values, selection, targets)
        return q_values, targets, self._backward(kept, gradient)

    def _head_gradients_by_pytorch(
        self, features: th.Tensor, actions: th.Tensor, batch_targets: Callable[[], th.Tensor]
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        return super()._head_gradients_of(features, super()._selections(actions, actions.size(0)), batch_targets)

    def _workspaces_for(self, n_rows: int) -> list[Workspace]:
        if not self._workspaces or len(self._workspaces[0].means) != n_rows:
            self._workspaces = [Workspace.of(layer, n_rows) for layer in self.compiled_head.hidden_layers]
        return self._workspaces

    def _final_layer_gradients(
        self, activations: np.ndarray, q_values: th.Tensor, actions: th.Tensor, targets: th.Tensor
    ) -> np.ndarray:
        """Write those of the final layer's parameters; gives that of the last activations."""
        gradient = np.empty_like(activations)
        try:
            kernels.squared_td_error_backward(
                activations,
                self.compiled_head.final_weight,
                q_values.numpy(),
                actions.numpy(),
                targets.contiguous().numpy(),
                gradient,
                self.compiled_gradients.final_weight,
                self.compiled_gradients.final_bias,
            )
        except IndexError:
            is_one = (actions >= 0) & (actions < q_values.size(1))
            wrong = actions[~is_one][0].item()
            raise RuntimeError(f"actions of a batch must be in 0 to {q_values.size(1) - 1}, got {wrong}") from None
        return gradient

    def _backward(self, kept: list[KeptLayer], gradient: np.ndarray) -> th.Tensor | None:
        """As :func:`sb3_lecture_dqn.fast.head.backward` for the hidden layers; the gradient is overwritten."""
        tasks: list[Task[None]] = []
        try:
            for index in reversed(range(len(kept))):
                layer, gradients = self.compiled_head.hidden_layers[index], self.compiled_gradients.hidden_layers[index]
                layer.backward_to_linear(gradients, kept[index], gradient)
                of_outputs = th.from_numpy(gradient)
                weight_gradient = partial(gradients.write_weight_gradient, kept[index].inputs, of_outputs)
                if index == 0 and not self.has_trained_encoder:
                    weight_gradient()
                    return None
                tasks.append(self.second_thread.start(weight_gradient, Work.GRADIENTS))
                gradient = inputs_gradient(layer.linear, of_outputs).numpy()
        finally:  # so that nobody writes into the gradients later, even if this was interrupted
            wait_for_all(tasks)
        return th.from_numpy(gradient)

    def _squared_norm(self) -> th.Tensor:
        if not self._is_for_one_thread:
            return super()._squared_norm()
        return th.from_numpy(np.array(kernels.squared_norm(self._flat_gradient), self._flat_gradient.dtype))

"""Adam on one flat tensor, of which the network's parameters are views."""

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any, TypeGuard

import numpy as np
import torch as th
from torch import nn
from torch.optim import optimizer as torch_optimizer

HOOKS_OF_ALL_OPTIMIZERS = (torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks)
#: Methods that somebody may have put into an optimizer; PyTorch's learning-rate schedulers wrap ``step``.
REPLACEABLE_METHODS = frozenset({"step", "zero_grad"})


def is_plain_adam(optimizer: th.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> TypeGuard[th.optim.Adam]:
    """
    Whether an optimizer is Adam without extras, over exactly these parameters.

    :param optimizer: The optimizer
    :param parameters: The parameters of the Q network
    :return: Whether :class:`FlatAdam` does the same
    """
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or any(HOOKS_OF_ALL_OPTIMIZERS):
        return False
    if not REPLACEABLE_METHODS.isdisjoint(vars(optimizer)):
        return False
    group = optimizer.param_groups[0]
    has_extras = group["weight_decay"] != 0 or group["amsgrad"] or group["maximize"] or isinstance(group["lr"], th.Tensor)
    same_parameters = len(group["params"]) == len(parameters) and all(map(is_, group["params"], parameters))
    return same_parameters and not has_extras and all(map(attrgetter("requires_grad"), parameters))


def has_one_step_count(optimizer: th.optim.Optimizer) -> bool:
    """
    Whether an Adam counts the steps of all its parameters alike.

    :param optimizer: The optimizer
    :return: ``False`` if some of them were frozen in some of the steps
    """
    states = [optimizer.state.get(parameter) or {} for parameter in optimizer.param_groups[0]["params"]]
    return len({float(state.get("step", 0)) for state in states}) == 1


def is_in_shared_memory(tensor: th.Tensor) -> bool:
    """
    Whether other processes may see a tensor.

    :param tensor: The tensor
    :return: Whether it is in shared memory; PyTorch says so of all that is on a GPU
    """
    return tensor.device.type == "cpu" and tensor.untyped_storage().is_shared()


def flatten(parameters: Sequence[th.Tensor]) -> th.Tensor:
    """
    Move parameters into one tensor and make them views of it.

    :param parameters: Parameters of one type, on one device
    :return: The flat tensor
    """
    flat = parameters[0].new_empty(sum(parameter.numel() for parameter in parameters))
    for parameter, view in zip(parameters, views(flat, parameters), strict=True):
        view.copy_(parameter.detach())
        parameter.data = view
    return flat


def unflatten(parameters: Sequence[th.Tensor], optimizer: th.optim.Optimizer) -> None:
    """
    Give each parameter, its gradient and its moments memory of their own again: a pickle of a view holds all it is a view of.

    :param parameters: Parameters that may have been moved by :func:`flatten`
    :param optimizer: Their optimizer
    """
    for parameter in parameters:
        if parameter.untyped_storage().nbytes() == parameter.nbytes or is_in_shared_memory(parameter):
            continue
        parameter.data = parameter.data.clone()
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
        state = optimizer.state.get(parameter, {})
        state.update({name: value.clone() for name, value in state.items() if isinstance(value, th.Tensor)})


def views(flat: th.Tensor, parameters: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The parts of a flat tensor in the shapes of parameters, and in their order of dimensions in memory.

    :param flat: The flat tensor
    :param parameters: What gives the order and the shapes
    :return: Views of ``flat``
    """
    parts = th.split(flat, [p.numel() for p in parameters])
    strides = [th.empty_like(p, device="meta").stride() for p in parameters]  # of a tensor without gaps
    return [
        part.as_strided(p.shape, stride, part.storage_offset())
        for part, p, stride in zip(parts, parameters, strides, strict=True)
    ]


class FlatAdam:
    """
    Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980) on flat tensors, writing into the state of a ``torch.optim.Adam``.

    :param optimizer: The optimizer whose settings it follows and whose state it keeps
    :param theta: θ, flat; the optimizer's parameters are views of it
    :param gradient: The gradient of θ, flat
    """

    def __init__(self, optimizer: th.optim.Adam, theta: th.Tensor, gradient: th.Tensor) -> None:
        self.optimizer = optimizer
        self.theta, self.gradient = theta, gradient
        self.first_moment, self.second_moment = th.zeros_like(theta), th.zeros_like(theta)
        parameters = optimizer.param_groups[0]["params"]
        self.step_counts = th.zeros(len(parameters))  # Adam has one for each parameter; has_one_step_count has looked
        self.step_count = self.step_counts[0]
        moments = zip(views(self.first_moment, parameters), views(self.second_moment, parameters), strict=True)
        self.states: list[dict[str, Any]] = []
        self.parts_of_states: list[th.Tensor] = []
        for parameter, step_count, (first_moment, second_moment) in zip(parameters, self.step_counts, moments, strict=True):
            state = optimizer.state[parameter]
            parts = {"step": step_count, "exp_avg": first_moment, "exp_avg_sq": second_moment}
            for name, part in parts.items() if state else ():
                part.copy_(state[name])
            state.update(parts)
            self.states.append(state)
            self.parts_of_states.extend(state.values())

    def is_current(self) -> bool:
        """
        Whether the optimizer's state is still in the flat tensors, and not another one (``set_parameters``).

        :return: Whether it is
        """
        states = map(self.optimizer.state.get, self.optimizer.param_groups[0]["params"])
        parts = list(chain.from_iterable(map(dict.values, self.states)))
        return (
            all(map(is_, states, self.states))
            and len(parts) == len(self.parts_of_states)
            and all(map(is_, parts, self.parts_of_states))
        )

    def step(self) -> None:
        """One step of Adam, by PyTorch's own kernel for one tensor."""
        self.step_counts += 1
        group = self.optimizer.param_groups[0]
        th._fused_adam_(
            [self.theta],
            [self.gradient],
            [self.first_moment],
            [self.second_moment],
            [],
            [self.step_count],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class DeviceAdam(FlatAdam):
    """
    The same for steps that are captured once and replayed on a GPU: the numbers that change are read from the device.

    It is made of plain operations: PyTorch's kernel gives each 65,536 numbers to one of a GPU's hundred processors, and most
    would have none. The optimizer keeps its step counts on the CPU, as PyTorch's plain Adam does; :meth:`end` follows them.

    :param optimizer: As for :class:`FlatAdam`
    :param theta: As for :class:`FlatAdam`
    :param gradient: As for :class:`FlatAdam`
    """

    def __init__(self, optimizer: th.optim.Adam, theta: th.Tensor, gradient: th.Tensor) -> None:
        super().__init__(optimizer, theta, gradient)
        self.direction = th.zeros_like(theta)
        self._coefficients: Iterator[th.Tensor] = iter(())

    @property
    def betas(self) -> tuple[float, float]:
        """β₁ and β₂, which a captured step does not read again."""
        beta_1, beta_2 = self.optimizer.param_groups[0]["betas"]
        return beta_1, beta_2

    def coefficients(self, n_steps: int) -> th.Tensor:
        """
        What the next steps have to know: with the bias corrections 1 − β₁ᵗ and 1 − β₂ᵗ, a step is θ += a m / (√v + b).

        :param n_steps: How many they will be
        :return: a and b of each step, shape (n_steps, 2), on the host
        """
        group, (beta_1, beta_2) = self.optimizer.param_groups[0], self.betas
        counts = float(self.step_count) + np.arange(1, n_steps + 1)
        roots = np.sqrt(1 - beta_2**counts)
        both = np.stack([-group["lr"] * roots / (1 - beta_1**counts), group["eps"] * roots], axis=1)
        return th.from_numpy(both).to(self.theta.dtype)

    def begin(self, coefficients: th.Tensor) -> None:
        """
        Before some steps, and before they are captured.

        :param coefficients: What :meth:`coefficients` gave for them, on the device
        """
        self._coefficients = iter(coefficients)

    def end(self, n_steps: int) -> None:
        """
        After these steps, or when they were replayed: tell the optimizer.

        :param n_steps: How many they were
        """
        self.step_counts += n_steps

    def step(self) -> None:
        """One step of Adam."""
        scale, epsilon = next(self._coefficients)
        beta_1, beta_2 = self.betas
        self.first_moment.lerp_(self.gradient, 1 - beta_1)
        self.second_moment.mul_(beta_2).addcmul_(self.gradient, self.gradient, value=1 - beta_2)
        th.sqrt(self.second_moment, out=self.direction).add_(epsilon)
        th.div(self.first_moment, self.direction, out=self.direction)
        self.theta.addcmul_(self.direction, scale)

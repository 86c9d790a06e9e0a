"""
The update of ``LectureDQN.train``, faster: the same function of θ, ψ and B without what PyTorch's modules and graph add.

The head of the Q network, ``[Linear → LayerNorm → LeakyReLU] × n → Linear``, is computed forward and backward by hand; an
encoder in front of it still runs by autograd. θ, its gradient and Adam's moments are each one flat tensor, of which the
network's parameters are views, so that Adam and clipping are a few operations in all. Saving and loading see nothing of this:
the parameters and ``policy.optimizer`` hold what they would hold anyway.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch as th
from torch import nn

from sb3_lecture_dqn.policies import LectureDQNPolicy, QNetwork


class HiddenLayer(NamedTuple):
    """Linear → LayerNorm (or nothing) → LeakyReLU, whose slope is 0 for ReLU."""

    linear: nn.Linear
    layer_norm: nn.LayerNorm | None
    negative_slope: float


class Head(NamedTuple):
    """The layers behind the encoder."""

    hidden_layers: list[HiddenLayer]
    final_layer: nn.Linear


def read_head(q_net: QNetwork) -> Head | None:
    """
    The layers of a Q network, if they are of the lecture's kind.

    :param q_net: The network
    :return: Its layers; ``None`` if there is any other layer, a hook, or a forward pass of a user's own
    """
    if type(q_net).forward is not QNetwork.forward or _has_hooks(q_net):
        return None
    *layers, final_layer = q_net.q_net
    hidden_layers = []
    while layers:
        linear = layers.pop(0)
        layer_norm = layers[0] if layers and isinstance(layers[0], nn.LayerNorm) else None
        layers = layers[1:] if layer_norm else layers
        activation = layers.pop(0) if layers else None
        if not isinstance(linear, nn.Linear) or not isinstance(activation, (nn.LeakyReLU, nn.ReLU)):
            return None
        hidden_layers.append(HiddenLayer(linear, layer_norm, getattr(activation, "negative_slope", 0.0)))
    return Head(hidden_layers, final_layer) if isinstance(final_layer, nn.Linear) else None


def _has_hooks(q_net: QNetwork) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (q_net, *q_net.q_net))


def is_plain_adam(optimizer: th.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> TypeGuard[th.optim.Adam]:
    """
    Whether an optimizer is Adam without extras, over exactly these parameters.

    :param optimizer: The optimizer
    :param parameters: The parameters of the Q network
    :return: Whether :class:`FlatAdam` does the same
    """
    if type(optimizer) is not th.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    has_extras = group["weight_decay"] != 0 or group["amsgrad"] or group["maximize"] or isinstance(group["lr"], th.Tensor)
    same_parameters = [id(p) for p in group["params"]] == [id(p) for p in parameters]
    return same_parameters and not has_extras and all(p.requires_grad for p in parameters)


def flatten(parameters: Sequence[th.Tensor]) -> th.Tensor:
    """
    Move parameters into one tensor and make them views of it.

    :param parameters: Parameters of one type, on one device
    :return: The flat tensor
    """
    flat = th.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, view in zip(parameters, views(flat, parameters), strict=True):
        parameter.data = view
    return flat


def views(flat: th.Tensor, parameters: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The parts of a flat tensor in the shapes of parameters.

    :param flat: The flat tensor
    :param parameters: What gives the order and the shapes
    :return: Views of ``flat``
    """
    parts = th.split(flat, [p.numel() for p in parameters])
    return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


def split_observations(observations: Any, batch_size: int) -> list[Any]:
    """
    Cut observations into batches.

    :param observations: A tensor, or a dictionary of tensors, of any number of batches
    :param batch_size: Number of observations in a batch
    :return: The batches
    """
    if not isinstance(observations, dict):
        return list(th.split(observations, batch_size))
    parts = {key: th.split(value, batch_size) for key, value in observations.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


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
        self.first_moment, self.second_moment, self.denominator = (th.zeros_like(theta) for _ in range(3))
        self.step_count = 0
        parameters = optimizer.param_groups[0]["params"]
        moments = zip(views(self.first_moment, parameters), views(self.second_moment, parameters), strict=True)
        self.states: list[dict[str, Any]] = []
        for parameter, (first_moment, second_moment) in zip(parameters, moments, strict=True):
            state = optimizer.state[parameter]
            if state:
                first_moment.copy_(state["exp_avg"])
                second_moment.copy_(state["exp_avg_sq"])
                self.step_count = int(state["step"])
            state.update(step=th.tensor(float(self.step_count)), exp_avg=first_moment, exp_avg_sq=second_moment)
            self.states.append(state)

    def is_current(self) -> bool:
        """Whether nobody (``set_parameters``, a step of the optimizer itself) has changed the state since."""
        parameters = self.optimizer.param_groups[0]["params"]
        is_same = all(self.optimizer.state.get(p) is state for p, state in zip(parameters, self.states, strict=True))
        return is_same and all(state["step"] == self.step_count for state in self.states[:1])

    def step(self) -> None:
        """One step of Adam, in PyTorch's order of operations."""
        group = self.optimizer.param_groups[0]
        beta1, beta2 = group["betas"]
        self.step_count += 1
        first_correction = 1 - beta1**self.step_count
        second_correction = 1 - beta2**self.step_count
        self.first_moment.lerp_(self.gradient, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1 - beta2)
        th.sqrt(self.second_moment, out=self.denominator).div_(second_correction**0.5).add_(group["eps"])
        self.theta.addcdiv_(self.first_moment, self.denominator, value=-group["lr"] / first_correction)

    def write_step_count(self) -> None:
        """Tell the optimizer's state how many steps were made."""
        for state in self.states:
            state["step"].fill_(self.step_count)


class HeadPass(NamedTuple):
    """What a forward pass keeps for the backward pass: for each hidden layer its input, Linear's and LayerNorm's output."""

    inputs: list[th.Tensor]
    linear_outputs: list[th.Tensor]
    normalised: list[tuple[th.Tensor, th.Tensor, th.Tensor]]
    q_values: th.Tensor


def forward(head: Head, features: th.Tensor) -> HeadPass:
    """
    Q(s, ·) of the head.

    :param head: The layers
    :param features: What the encoder gives, shape (B, features_dim)
    :return: The Q values, shape (B, |A|), and what the backward pass needs
    """
    inputs, linear_outputs, normalised = [features], [], []
    for linear, layer_norm, negative_slope in head.hidden_layers:
        output = th.addmm(linear.bias, inputs[-1], linear.weight.t())
        linear_outputs.append(output)
        if layer_norm is None:
            normalised.append((output, output, output))
        else:
            normalised.append(
                th.native_layer_norm(output, layer_norm.normalized_shape, layer_norm.weight, layer_norm.bias, layer_norm.eps)
            )
        inputs.append(nn.functional.leaky_relu(normalised[-1][0], negative_slope))
    q_values = th.addmm(head.final_layer.bias, inputs[-1], head.final_layer.weight.t())
    return HeadPass(inputs, linear_outputs, normalised, q_values)


def backward(head: Head, made: HeadPass, gradient: th.Tensor, needs_features: bool) -> th.Tensor | None:
    """
    Write the gradients of the head's parameters into their ``.grad``.

    :param head: The layers
    :param made: The forward pass
    :param gradient: The gradient of the Q values, shape (B, |A|)
    :param needs_features: Whether the gradient of the features is needed
    :return: The gradient of the features, shape (B, features_dim), if needed
    """
    _linear_gradients(head.final_layer, made.inputs[-1], gradient)
    gradient = gradient @ head.final_layer.weight
    for index in reversed(range(len(head.hidden_layers))):
        linear, layer_norm, negative_slope = head.hidden_layers[index]
        output, mean, rstd = made.normalised[index]
        gradient = th.ops.aten.leaky_relu_backward(gradient, output, negative_slope, False)
        if layer_norm is not None:
            gradient, weight_gradient, bias_gradient = th.ops.aten.native_layer_norm_backward(
                gradient,
                made.linear_outputs[index],
                layer_norm.normalized_shape,
                mean,
                rstd,
                layer_norm.weight,
                layer_norm.bias,
                [True, True, True],
            )
            _gradient_of(layer_norm.weight).copy_(weight_gradient)
            _gradient_of(layer_norm.bias).copy_(bias_gradient)
        _linear_gradients(linear, made.inputs[index], gradient)
        if index > 0 or needs_features:
            gradient = gradient @ linear.weight
    return gradient if needs_features else None


def _linear_gradients(linear: nn.Linear, inputs: th.Tensor, gradient: th.Tensor) -> None:
    th.mm(gradient.t(), inputs, out=_gradient_of(linear.weight))
    th.sum(gradient, dim=0, out=_gradient_of(linear.bias))


def _gradient_of(parameter: th.Tensor) -> th.Tensor:
    assert parameter.grad is not None
    return parameter.grad


class FastUpdate:
    """
    The update for one policy.

    :param policy: The policy; its parameters become views of flat tensors
    :param optimizer: Its optimizer
    :param head: The layers of its Q network
    :param target_head: The layers of its target network
    """

    def __init__(self, policy: LectureDQNPolicy, optimizer: th.optim.Adam, head: Head, target_head: Head) -> None:
        self.policy, self.head, self.target_head = policy, head, target_head
        self.parameters = list(policy.q_net.parameters())
        self.theta = flatten(self.parameters)
        self.gradient = th.zeros_like(self.theta)
        for parameter, view in zip(self.parameters, views(self.gradient, self.parameters), strict=True):
            parameter.grad = view
        self.adam = FlatAdam(optimizer, self.theta, self.gradient)
        self.has_trained_encoder = any(True for _ in policy.q_net.features_extractor.parameters())

    @classmethod
    def for_policy(cls, policy: LectureDQNPolicy) -> "FastUpdate | None":
        """
        The fast update of a policy.

        :param policy: The policy
        :return: Its update, or ``None`` where only the plain one is right: other layers, other optimizers, hooks, a GPU
        """
        heads = read_head(policy.q_net), read_head(policy.q_net_target)
        parameters = list(policy.q_net.parameters())
        kinds = {(p.device.type, p.dtype) for p in (*parameters, *policy.q_net_target.parameters())}
        if heads[0] is None or heads[1] is None or len(kinds) > 1 or policy.device.type != "cpu":
            return None
        if not is_plain_adam(policy.optimizer, parameters):
            return None
        return cls(policy, policy.optimizer, heads[0], heads[1])

    def is_current(self, policy: LectureDQNPolicy) -> bool:
        """
        Whether the policy is still as it was when this was made.

        :param policy: The policy that is trained now
        :return: Whether its parameters, gradients and optimizer state are still in the flat tensors
        """
        return (
            policy is self.policy
            and not _has_hooks(policy.q_net)
            and not _has_hooks(policy.q_net_target)
            and all(
                p.data_ptr() == view.data_ptr()
                for p, view in zip(self.parameters, views(self.theta, self.parameters), strict=True)
            )
            and self.adam.is_current()
        )

    @th.no_grad()
    def next_q_values(self, next_observations: Any) -> th.Tensor:
        """
        Q(s', ·, ψ).

        :param next_observations: s'
        :return: Q values, shape (B, |A|)
        """
        target = self.policy.q_net_target
        features = target.extract_features(next_observations, target.features_extractor)
        return forward(self.target_head, features).q_values

    def step(
        self, observations: Any, actions: th.Tensor, targets: th.Tensor, max_grad_norm: float | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        One gradient step on the mean of (Q(s, a, θ) − target)².

        :param observations: s
        :param actions: a, shape (B, 1)
        :param targets: Targets, shape (B, 1)
        :param max_grad_norm: Largest norm of the gradient; ``None`` for no clipping
        :return: The loss, Q(s, a, θ) of shape (B, 1), and the norm of the gradient before clipping
        """
        q_net = self.policy.q_net
        with th.set_grad_enabled(self.has_trained_encoder):
            features = q_net.extract_features(observations, q_net.features_extractor)
        with th.no_grad():
            made = forward(self.head, features)
            q_values = made.q_values.gather(1, actions)
            errors = q_values - targets
            loss = errors.square().mean()
            gradient = th.zeros_like(made.q_values).scatter_(1, actions, errors.mul_(2 / len(errors)))
            features_gradient = backward(self.head, made, gradient, self.has_trained_encoder)
        if features_gradient is not None:
            self._encoder_gradients(features, features_gradient)
        with th.no_grad():
            gradient_norm = self.gradient.norm()
            if max_grad_norm is not None:
                # PyTorch's clip_grad_norm_ scales like this, without waiting for the device to compare
                self.gradient.mul_((max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1.0))
            self.adam.step()
        return loss, q_values, gradient_norm

    def _encoder_gradients(self, features: th.Tensor, features_gradient: th.Tensor) -> None:
        for parameter in self.policy.q_net.features_extractor.parameters():
            _gradient_of(parameter).zero_()
        th.autograd.backward(features, features_gradient)

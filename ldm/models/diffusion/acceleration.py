"""Faster ways to call the U-Net and to make a training step: compiled, or captured in a CUDA graph.

Both compute what the plain call computes. They are switches (`compile_unet`, `cuda_graph`), off by default. A capture
takes seconds and removes the launch overhead; compilation takes about a minute and also fuses kernels
(docs/benchmarks.md).
Shapes: B batch, C latent channels, H W latent height and width, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context, Projected
from ldm.modules.diffusionmodules.openaimodel import UNetModel

WARM_UP = 3  # calls before a capture, in which libraries choose their kernels and allocate

Step = tuple[Tensor, dict[str, Tensor]]  # loss, and the values to be logged


class FixedUNet:
    """A U-Net that is called through buffers of its own, one set for each size of its inputs.

    One compiled or captured call then serves all stages, prompts and seeds: a new stage is copied into the buffers.
    Threads take turns. With gradients (training) the call goes to the compiled U-Net directly.

    Args:
        mode: `cuda_graph`, or a mode of torch.compile. On the CPU graphs do not exist, and the plain or the compiled
            U-Net is called.
    """

    def __init__(self, unet: UNetModel, mode: str) -> None:
        self.unet, self.mode = unet, mode
        self.captured = mode == "cuda_graph"
        self.call: Callable[..., Tensor] = unet
        if not self.captured:
            self.call = torch.compile(unet, fullgraph=True, mode=mode)
        self._buffers: dict[Hashable, _Buffers] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[FixedUNet], tuple[UNetModel, str]]:
        """Copies begin without buffers: what was captured reads the weights of this U-Net."""
        return FixedUNet, (self.unet, self.mode)

    def __call__(self, x: Tensor, timesteps: Tensor, context: Context | Projected) -> Tensor:
        """Call the U-Net; arguments and result as for `UNetModel.forward`."""
        if torch.is_grad_enabled():
            return self.call(x, timesteps, context)
        if isinstance(context, Context):
            context = self.unet.project(context)
        k = context.layer(0)[0]
        # autocast may free, after a capture, the copies of weights that the graph reads
        capture = self.captured and x.is_cuda and not torch.is_autocast_enabled("cuda")
        # the address of a weight: a model that was moved or loaded anew must be captured anew
        key = x.shape, x.device, k.shape, k.dtype, self.unet.dtype, next(self.unet.out.parameters()).data_ptr(), capture
        with self._lock:
            if key not in self._buffers:
                self._buffers[key] = _Buffers(self.call, x, timesteps, context, capture)
            return self._buffers[key](x, timesteps, context)


class _Buffers:
    """Copies of the inputs, and a call that reads them."""

    def __init__(
        self, call: Callable[..., Tensor], x: Tensor, timesteps: Tensor, context: Projected, capture: bool
    ) -> None:
        with torch.inference_mode(False):  # calls outside of it write into them, too
            self.x, self.timesteps, self.context = x.clone(), timesteps.clone(), context.clone()
        self.current = context
        self._run: Callable[[], Tensor] = lambda: call(self.x, self.timesteps, self.context)
        if capture:
            self._run = self._captured()

    def _captured(self) -> Callable[[], Tensor]:
        with torch.cuda.device(self.x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # PyTorch's own stream for captures stays on the device of the first one; other threads may go on meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                out = self._run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def __call__(self, x: Tensor, timesteps: Tensor, context: Projected) -> Tensor:
        self.x.copy_(x)
        self.timesteps.copy_(timesteps)
        if context is not self.current:
            for own, new in zip(self.context.tensors(), context.tensors(), strict=True):
                own.copy_(new)
            self.current = context
        return self._run().clone()  # the next call writes into the same place


class TensorStep(nn.Module):
    """The loss of a training step as a function of tensors only, whose parameters are what is learned.

    Args:
        learned: the embedding manager.
        step: function of the inputs; no module, so that the model's frozen weights are no parameters here.
    """

    def __init__(self, learned: nn.Module | None, step: Callable[..., Step]) -> None:
        super().__init__()
        self.learned, self._step = learned, step
        self._names: list[str] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, then the values to be logged."""
        loss, parts = self._step(*inputs)
        self._names = list(parts)
        return loss, *parts.values()

    def named(self, values: tuple[Tensor, ...]) -> Step:
        """Return what `step` gave, from what `forward` gives."""
        loss, *parts = values
        # whoever keeps these reads them later than the next replay writes into the same place
        return loss.clone(), {name: part.detach().clone() for name, part in zip(self._names, parts, strict=True)}

    def capture(self, examples: Sequence[Tensor]) -> TensorStep:
        """Capture forward and backward pass in CUDA graphs, for inputs of the sizes of `examples`.

        Dropout stays random: a replay reads the device's generator.
        """
        inputs = tuple(x.detach().clone() for x in examples)
        with torch.cuda.device(inputs[0].device):
            captured: Any = torch.cuda.make_graphed_callables
            return captured(self, inputs, num_warmup_iters=WARM_UP, allow_unused_input=True)

"""Simulating one block of each kind, for all blocks of a model that are its equals.

A simulation takes its time for single operations, and most of a model's are those of dozens of equal blocks. Here a
block of each kind is run alone, on inputs of its own, and the course of its memory is written down, forwards and
backwards. In the model each such block then only makes its outputs, and lets that course happen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from library.memory.simulation import Bytes, Course, Effort, PeakMemory, Stretch
from library.training.plan.block_kinds import Unlike, block_kind

if TYPE_CHECKING:
    from library.memory.apply import AppliedPlan

Layout = tuple[Any, ...]
"""Of a tensor: shape, stride, dtype, device, the number of its storage, that storage's bytes, and the offset in it."""
TENSOR = object()
"""The place of a tensor among arguments."""


class NotRepeatable(Exception):
    """A block leaves something behind when it is done, so that the next one may take other memory."""


@contextlib.contextmanager
def each_kind_once(
    blocks: Iterable[nn.Module], applied: AppliedPlan, memory: PeakMemory, trained: Sequence[nn.Parameter]
) -> Iterator[None]:
    """For a while, of equal ``blocks`` one is simulated, and the others take what it takes.

    ``applied``: the memory plan on them; ``trained``: the parameters that get gradients. Raises NotRepeatable, from
    what is done meanwhile, where blocks turn out not to be equal.
    """
    below = {id(block): before for block, _, before in applied.replaced}
    known: dict[Any, BlockMemory | None] = {}
    kinds: dict[Any, int] = {}
    replaced: list[tuple[nn.Module, Any]] = []
    if applied.plan.offload_inputs:  # what a block does then depends on the others
        blocks = ()
    try:
        for block in blocks:
            with contextlib.suppress(Unlike):
                forward = vars(block).get("forward")
                kind = (id(block) in below, block_kind(block, below.get(id(block), forward)))
                number = kinds.setdefault(kind, len(kinds))
                replaced.append((block, forward))
                block.forward = partial(_call, block.forward, number, known, memory, trained)  # type: ignore[method-assign]
        yield
    finally:
        for block, forward in replaced:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _call(
    forward: Callable[..., Any],
    kind: int,
    known: dict[Any, BlockMemory | None],
    memory: PeakMemory,
    trained: Sequence[nn.Parameter],
    *args: Any,
    **named: Any,
) -> Any:
    """``forward(*args, **named)``, or tensors like its outputs."""
    leaves, structure = tree_flatten((args, named))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    arguments = Arguments(
        structure,
        tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves),
        tuple(layouts_of(tensors)),
        tuple(tensor.requires_grad for tensor in tensors),
    )
    cast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    key = (kind, arguments.key, torch.is_grad_enabled(), *cast)
    try:
        hash(key)
    except TypeError:  # an argument that could be anything
        return forward(*args, **named)
    if key not in known:
        made = BlockMemory(forward, arguments, cast, memory, trained)
        known[key] = made if made.is_known else None
    found = known[key]
    return forward(*args, **named) if found is None else found.outputs_for(tensors)


# ---- where tensors lie -----------------------------------------------------------------------------------------------


def layouts_of(tensors: Iterable[Tensor | None]) -> list[Layout | None]:
    """How tensors lie in memory, and which of them share it."""
    numbers: dict[int, int] = {}
    found: list[Layout | None] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        else:
            storage = tensor.untyped_storage()
            number = numbers.setdefault(storage._cdata, len(numbers))
            place = (number, storage.nbytes(), tensor.storage_offset())
            found.append((tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, *place))
    return found


def laid_out(layouts: Iterable[Layout | None], there: Mapping[int, Tensor] | None = None) -> list[Tensor | None]:
    """Tensors that lie like that; ``there``: one in each storage that exists already, by its number."""
    storages = dict(there or {})
    made: list[Tensor | None] = []
    for layout in layouts:
        if layout is None:
            made.append(None)
            continue
        shape, stride, dtype, device, number, size, offset = layout
        if number not in storages:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            if offset == 0 and tensor.untyped_storage().nbytes() == size:
                storages[number] = tensor
                made.append(tensor)
                continue
            del tensor
            storages[number] = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        if storages[number].dtype != dtype:
            raise NotRepeatable
        made.append(storages[number].as_strided(shape, stride, offset))
    return made


# ---- a block alone ---------------------------------------------------------------------------------------------------


class Arguments:
    """What a block is called with: what does not differ between equal calls."""

    def __init__(self, structure: Any, leaves: Sequence[Any], layouts: Sequence[Layout | None], needs: Sequence[bool]):
        self.structure, self.leaves, self.layouts, self.needs = structure, leaves, layouts, needs
        """``needs``: which tensors need gradients."""

    @property
    def key(self) -> Any:
        """Equal for equal calls."""
        return str(self.structure), self.leaves, self.layouts, self.needs

    def filled(self, tensors: Iterable[Tensor | None]) -> Any:
        """Positional and named arguments."""
        values = iter(tensors)
        return tree_unflatten([next(values) if leaf is TENSOR else leaf for leaf in self.leaves], self.structure)


class _Enter(torch.autograd.Function):
    """An input's way into a block that runs alone: its gradient ends in ``arrived``.

    It needs one because of ``anchor``, a tensor without values. (Autograd would hold a leaf's memory to the end.)
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, arrived: dict[int, Tensor], index: int) -> Tensor:
        ctx.arrived, ctx.index = arrived, index
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        (ctx.arrived[ctx.index],) = grads
        return None, None, None, None


class _Leave(torch.autograd.Function):
    """The outputs' way out: where the backward pass begins, with gradients that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *outputs: Tensor) -> Tensor:
        ctx.graph = graph
        return outputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        return None, *ctx.graph.first_gradients()


class _Graph:
    """What a block that ran alone keeps for its backward pass."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.arrived: dict[int, Tensor] = {}
        self.end: Tensor | None = None
        self.gradients: Sequence[Layout | None] = ()
        """Of the outputs."""

    def first_gradients(self) -> list[Tensor | None]:
        made = laid_out(self.gradients)
        for index, tensor in enumerate(made):
            if tensor is not None:
                self.course.give(tensor, ("gradient", index))
        self.course.begin()
        return made


class _Backward:
    """A known backward pass."""

    course: tuple[Stretch, ...]
    effort: Effort
    gradients: list[Layout | None]
    """Of the inputs."""
    lent: dict[int, int]
    """Numbers of storages among these that are those of outputs' gradients, by whose."""
    new: Bytes
    """Of the other storages."""


class BlockMemory:
    """What is known of a block's memory, for calls with arguments of one kind."""

    def __init__(
        self,
        forward: Callable[..., Any],
        arguments: Arguments,
        cast: Sequence[tuple[str, bool, torch.dtype]],
        memory: PeakMemory,
        trained: Sequence[nn.Parameter],
    ) -> None:
        self.forward, self.arguments, self.cast, self.memory, self.trained = forward, arguments, cast, memory, trained
        self.is_known = True
        """False where the block's outputs are its inputs, or it keeps something without a backward pass."""
        self.course: tuple[Stretch, ...] = ()
        self.outputs: Sequence[Layout | None] = ()
        self.differentiable: list[bool] = []
        self.structure: Any = None
        """Of what the block returns."""
        self.new: Bytes = (0, 0)
        """Of the outputs."""
        self.saved: Bytes = (0, 0)
        """What is kept for the backward pass, in addition to ``held``."""
        self.held: list[tuple[str, int]] = []
        """Inputs and outputs whose memory is kept for the backward pass."""
        self.effort = Effort()
        """Of a forward pass."""
        self.backwards: dict[Any, _Backward] = {}
        self._anchor = torch.empty(0, requires_grad=True)
        self._graph: _Graph | None = self._alone()

    # Running alone

    def _alone(self) -> _Graph:
        """What a forward pass of the block alone keeps."""
        graph = _Graph(Course())
        with self.memory.apart(graph.course), contextlib.ExitStack() as contexts:
            for device, enabled, dtype in self.cast:
                contexts.enter_context(torch.autocast(device, dtype, enabled))
            self._run(graph)
            before = graph.course.level
            torch.clear_autocast_cache()  # weights that it keeps cast until the end of the forward pass
            if graph.course.level != before:
                raise NotRepeatable
            self.saved = graph.course.level
            self.held = sorted(graph.course.given.values())
            if graph.end is None and (self.saved != (0, 0) or self.held):
                self.is_known = False
        self.effort = graph.course.effort
        used = [sum(stretch.net[place] for stretch in self.course) for place in (0, 1)]
        self.new = (used[0] - self.saved[0], used[1] - self.saved[1])
        return graph

    def _run(self, graph: _Graph) -> None:
        course, inputs = graph.course, laid_out(self.arguments.layouts)
        for index, (tensor, needs_gradient) in enumerate(zip(inputs, self.arguments.needs)):
            assert tensor is not None
            course.give(tensor, ("input", index))
            if needs_gradient:
                inputs[index] = _Enter.apply(self._anchor, tensor, graph.arrived, index)
        args, named = self.arguments.filled(inputs)
        course.begin()
        result = self.forward(*args, **named)
        self.course = course.end()
        outputs, self.structure = tree_flatten(result)
        if any(not isinstance(output, Tensor) or output.untyped_storage()._cdata in course.given for output in outputs):
            self.is_known = False
            return
        self.outputs = layouts_of(outputs)
        self.differentiable = [output.requires_grad for output in outputs]
        for index, output in enumerate(outputs):
            course.give(output, ("output", index))
        if any(self.differentiable):
            graph.end = _Leave.apply(graph, *(output for output in outputs if output.requires_grad))

    def _backward_alone(self, gradients: Sequence[Layout | None]) -> _Backward:
        """A backward pass of the block alone, from gradients of the differentiable outputs that lie like these."""
        with torch.enable_grad():
            graph = self._graph or self._alone()
        self._graph, course, found = None, graph.course, _Backward()
        graph.gradients = gradients
        untouched = [parameter for parameter in self.trained if parameter.grad is None]
        before = course.effort
        with self.memory.apart(course):
            assert graph.end is not None
            torch.autograd.backward(graph.end, torch.empty_like(graph.end))
            found.course, found.effort = course.end(), self.memory.effort - before
            self._look_at_gradients(graph, found)
            graph.arrived.clear()
            graph.end = None
            for parameter in untouched:
                parameter.grad = None
        if course.level != (0, 0) or course.given:
            raise NotRepeatable
        return found

    def _look_at_gradients(self, graph: _Graph, found: _Backward) -> None:
        arrived = [graph.arrived.get(index) for index in range(len(self.arguments.layouts))]
        found.gradients, found.lent, new = layouts_of(arrived), {}, {}
        for tensor, layout in zip(arrived, found.gradients):
            if tensor is None or layout is None:
                continue
            owner = graph.course.given.get(tensor.untyped_storage()._cdata)
            if owner is None:
                new[layout[4]] = (layout[5], self.memory.is_on_host(tensor))
            elif owner[0] == "gradient":
                found.lent[layout[4]] = owner[1]
            else:
                raise NotRepeatable
        found.new = (
            sum(size for size, on_host in new.values() if not on_host),
            sum(size for size, on_host in new.values() if on_host),
        )

    # Taking the place of a block

    def outputs_for(self, tensors: Sequence[Tensor]) -> Any:
        """What the block returns for tensors like those of its arguments, and with it the course of its memory."""
        for stretch in self.course:
            self.memory.happen(stretch)
        self.memory.effort += self.effort
        self.memory.add_bytes((-self.new[0], -self.new[1]))
        if not any(self.differentiable):
            return tree_unflatten(laid_out(self.outputs), self.structure)
        call = _Call(self)
        outputs = _Stand.apply(call, self._anchor, *tensors)
        for what, index in self.held:
            source = tensors if what == "input" else outputs
            call.held[what, index] = source[index].untyped_storage()
        index = 0
        for output, is_differentiable in zip(outputs, self.differentiable):
            if is_differentiable:
                output.register_hook(partial(call.take, index))
                index += 1
        return tree_unflatten(list(outputs), self.structure)

    def backward_for(self, gradients: Sequence[Layout | None]) -> _Backward:
        """The backward pass from gradients of the outputs that lie like these."""
        key = tuple(gradients)
        if key not in self.backwards:
            self.backwards[key] = self._backward_alone(key)
        return self.backwards[key]


class _Call:
    """One block in the model, from its forward pass to its backward pass."""

    def __init__(self, block: BlockMemory) -> None:
        self.block = block
        self.held: dict[tuple[str, int], Any] = {}
        """Storages of inputs and outputs."""
        self.saved: Bytes | None = block.saved
        self.gradients: list[Tensor | None] = [None] * sum(block.differentiable)

    def take(self, index: int, gradient: Tensor) -> Tensor:
        """Keep an output's gradient, and give autograd one that takes no memory: it would hold it to the end."""
        self.gradients[index] = gradient
        with self.block.memory.apart(Course()):
            return torch.empty(1, dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    def backward(self) -> list[Tensor | None]:
        """The gradients of the inputs."""
        block, memory = self.block, self.block.memory
        known = block.backward_for(layouts_of(self.gradients))
        self.saved = None  # from here on the course says when it is freed
        memory.effort += known.effort
        for stretch in known.course:
            memory.happen(stretch)
            if stretch.then is not None:
                what, index = stretch.then
                if what == "gradient":
                    self.gradients[index] = None
                else:
                    del self.held[stretch.then]
        memory.add_bytes((-known.new[0], -known.new[1]))
        there = {number: self.gradients[index] for number, index in known.lent.items()}
        made = laid_out(known.gradients, there)  # type: ignore[arg-type]
        self.gradients.clear()
        return made

    def __del__(self) -> None:
        if self.saved is not None:  # no backward pass came
            self.block.memory.add_bytes((-self.saved[0], -self.saved[1]))


class _Stand(torch.autograd.Function):
    """A block's stand-in for autograd."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        outputs: list[Any] = laid_out(call.block.outputs)
        fixed = [output for output, flows in zip(outputs, call.block.differentiable) if not flows]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        return None, None, *ctx.call.backward()

"""Per-record gradients by the expanded leaf: no hooks, no wrapper, one forward and one backward.

Each record gets its own copy E_i of its client's slot as a leaf of the graph. The forward is a batched product with
E, so autograd's dLoss/dE is the stack of per-record gradients. Clients are fused by copying different rows of theta;
padding, ragged Poisson batches and K = 1 are the same code. For a factor of LoRA this costs what the summed gradient
costs (2 N T d r operations either way).

Copies have the dtype of the frozen weight they stand beside. In bfloat16 a record's gradient is therefore a bfloat16
number, whatever is done with it later: clipping takes its length as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fedlora.adapters.methods import Turn
from fedlora.adapters.methods.layout import Places, check_places
from fedlora.adapters.slots import AdapterLayout, Slot
from fedlora.engine.attachment import Attachment, Replacement
from fedlora.engine.backend import Batch, record_losses
from fedlora.engine.compiled import compiled_forward
from fedlora.engine.lora_function import LoraFunction
from fedlora.engine.per_record_attention import PerRecordAttention
from fedlora.errors import ModelError
from fedlora.models import Classifier


class ExpandedLoraLinear(Replacement):
    """y = base(x) + scale * x A_iᵀ B_iᵀ with factors A_i [r, d_in] and B_i [d_out, r] of each record i.

    A factor that is no slot is frozen and the same for all. All are in the dtype of the base's weight.
    """

    def __init__(self, base: nn.Linear, frozen: Mapping[str, Tensor], scale: float) -> None:
        super().__init__(base)
        self.scale = scale
        self._frozen = {factor: value.to(base.weight) for factor, value in frozen.items()}
        self.expanded: dict[str, Tensor] = {}  # factor -> [N, *shape]; set for the duration of one forward

    def forward(self, x: Tensor) -> Tensor:
        if not self.expanded:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # [N, T, d_in]
        return self._adapted(rows).view(*x.shape[:-1], -1)

    def _adapted(self, rows: Tensor) -> Tensor:
        factors = self._factor("B", len(rows)), self._factor("A", len(rows))
        arguments = rows, *factors, self.base.weight, self.base.bias, self.scale
        output, _ = LoraFunction.apply(*arguments)  # type: ignore[no-untyped-call]
        return output  # type: ignore[no-any-return]

    def _factor(self, name: str, count: int) -> Tensor:
        """[N, *shape] of the records' own, or of what is frozen."""
        own = self.expanded.get(name)
        return self._frozen[name].expand(count, -1, -1) if own is None else own


class PlainLoraLinear(ExpandedLoraLinear):
    """The same by torch's own differentiation: for `torch.func.vmap`, and what the other is tested against."""

    def _adapted(self, rows: Tensor) -> Tensor:
        outer, inner = (self._factor(name, len(rows)) for name in ("B", "A"))
        return torch.baddbmm(self.base(rows), rows @ inner.transpose(1, 2), outer.transpose(1, 2), alpha=self.scale)


class ExpandedCoreLinear(ExpandedLoraLinear):
    """y = base(x) + scale * x A_iᵀ R_iᵀ B_iᵀ with one R_i [r, r] per record too."""

    def _adapted(self, rows: Tensor) -> Tensor:
        adapted = rows
        for factor in ("A", "R", "B"):
            own = self.expanded.get(factor)
            adapted = adapted @ (self._frozen[factor].T if own is None else own.transpose(1, 2))
        return torch.add(self.base(rows), adapted, alpha=self.scale)


class ExpandedLinear(Replacement):
    """A fully trained linear of the head: one weight [d_out, d_in] and bias [d_out] per record."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.expanded: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.expanded:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        output = rows @ self.expanded["weight"].transpose(1, 2)
        if "bias" in self.expanded:
            output = output + self.expanded["bias"].unsqueeze(1)
        return output.view(*x.shape[:-1], output.shape[-1])


class ExpandedBackend:
    """Replaces the adapted linears of `classifier` and gives per-record gradients of the layout's slots."""

    fuses_clients = True

    def __init__(
        self,
        classifier: Classifier,
        layout: AdapterLayout,
        factors: Mapping[str, Tensor],
        places: Places,
        *,
        outer: Mapping[str, Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        """Attach.

        Args:
            classifier: changed in place; its frozen linears stay reachable as `.base`.
            layout: slots named `<base name>/B` (or A, or R), `head:<module>/weight` and `head:<module>/bias`.
            factors: A [r, d_in] float32 by base name, where A is no slot.
            places: paths of the modules that each base name adapts. A record has one leaf per slot: where several
                modules share it, its gradient is the sum over them and counts once in the clip.
            outer: B [d_out, r] float32 by base name, where B is no slot.
            compiled: whether gradients are taken through `torch.compile`: seconds for each new shape of a micro-batch,
                and faster ever after.

        Raises:
            AdapterError: `places` are another layout's, or another back end is still attached.
            ModelError: a module also sees inputs shared by all records and cannot be run record by record.
        """
        check_places(layout, places)
        paths = [path for own in places.values() for path in own]
        if classifier.family != "deberta-v2":
            refuse_shared_inputs(classifier, paths)
        self._attachment = Attachment(classifier)
        self.classifier, self.layout = classifier, layout
        self._traced = compiled_forward(classifier) if compiled else classifier
        self.slot_sizes = tuple(slot.size for slot in layout.slots)
        linears = classifier.target_modules(paths)
        apart = _attentions_to_separate(classifier, paths)
        frozen: dict[str, dict[str, Tensor]] = {
            name: {factor: kept[name] for factor, kept in (("A", factors), ("B", outer or {})) if name in kept}
            for name in places
        }

        def kind(path: str) -> type[ExpandedLoraLinear]:
            if "R" in layout.parts:
                return ExpandedCoreLinear
            return PlainLoraLinear if path.startswith(apart) else ExpandedLoraLinear

        adapted: dict[str, ExpandedLoraLinear | ExpandedLinear] = {}
        for name, own in places.items():
            for path in own:
                adapted[path] = kind(path)(linears[path], frozen[name], layout.scale)
        trained = {slot.name.rpartition("/")[0] for slot in layout.slots}
        for path, module in classifier.head_modules().items():
            if f"head:{path}" in trained:
                adapted[f"head:{path}"] = ExpandedLinear(module)
        for path, replacement in adapted.items():
            self._attachment.replace(path, replacement.base, replacement)
        for prefix in apart:
            inside = [module for path, module in adapted.items() if path.startswith(prefix)]
            attention = classifier.backbone.get_submodule(prefix.removesuffix("."))
            self._attachment.replace(prefix.removesuffix("."), attention, PerRecordAttention(attention, inside))
        bases = [(name, suffix) for name, _, suffix in (slot.name.rpartition("/") for slot in layout.slots)]
        self._users = [([adapted[path] for path in places.get(name, (name,))], suffix) for name, suffix in bases]

    def gradients(
        self, theta: Tensor, batch: Batch, labels: Tensor, owner: Tensor, turn: Turn | None = None
    ) -> list[Tensor]:
        expanded, leaves = [], []
        for slot, rows, dtype in self._rows(theta):
            value = _copies(rows[:1] if turn and slot.part in turn.common else rows, owner, dtype)
            if turn is None or slot.part in turn.parts:
                leaves.append(value.requires_grad_())
            expanded.append(value)
        loss = record_losses(self._forward(self._traced, expanded, batch), labels).sum()
        return [gradient.flatten(1).float() for gradient in torch.autograd.grad(loss, leaves)]

    @torch.no_grad()
    def logits(self, theta: Tensor, batch: Batch) -> Tensor:
        count = len(batch["input_ids"])
        expanded = [rows.to(dtype).expand(count, *rows.shape[1:]) for _, rows, dtype in self._rows(theta[None])]
        return self._forward(self.classifier, expanded, batch)

    def detach(self) -> None:
        self._attachment.undo()

    def _rows(self, theta: Tensor) -> Iterator[tuple[Slot, Tensor, torch.dtype]]:
        """Each slot, its numbers [K, *shape], and the dtype of the weights that it stands beside."""
        for slot, (modules, _) in zip(self.layout.slots, self._users, strict=True):
            yield slot, self.layout.view(theta, slot), modules[0].base.weight.dtype

    def _forward(self, forward: Callable[[Batch], Tensor], expanded: list[Tensor], batch: Batch) -> Tensor:
        self._attachment.confirm()
        try:
            for (modules, suffix), value in zip(self._users, expanded, strict=True):
                for module in modules:
                    module.expanded[suffix] = value
            return forward(batch)
        finally:
            for modules, _ in self._users:
                for module in modules:
                    module.expanded.clear()  # a stale leaf must never serve another batch


def _copies(rows: Tensor, owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Each record's copy of its client's row, [N, *shape]; of a single client's, the same memory N times.

    Rounded before or after, whichever are fewer: the same bits.
    """
    if len(rows) == 1:
        return rows.to(dtype).expand(len(owner), *rows.shape[1:])
    return rows.to(dtype)[owner] if len(rows) < len(owner) else rows[owner].to(dtype)


def _attentions_to_separate(classifier: Classifier, paths: Iterable[str]) -> tuple[str, ...]:
    """Where an adapted linear also sees what all records share, its attention runs record by record; paths with dot."""
    shared = classifier.shared_input_modules() & set(paths)
    return tuple({f"{path.rpartition('.')[0]}.": None for path in sorted(shared)})


def refuse_shared_inputs(classifier: Classifier, modules: Iterable[str]) -> None:
    """Refuse modules that see one input for the whole batch: their gradient does not split into records."""
    shared = sorted(classifier.shared_input_modules() & set(modules))
    if shared:
        raise ModelError(
            f"{len(shared)} target modules such as {shared[0]} also transform inputs shared by all records, so "
            "per-record gradients do not exist there; leave their type out of adapter.target_modules"
        )

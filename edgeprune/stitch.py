"""Stitched models: the dense model with each sub-block at any of its levels, judged by what comes out.

A database holds, for every sub-block and every number of units it may keep, the re-fitted sub-block
(SPDY's idea, arXiv 2201.13096). A choice of levels is then a model without any further work, and
calibration images tell how far it diverges from the dense one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgeprune import lowrank, obs, products, quantisation, recovery, tasks, vit
from edgeprune.anatomies import MergingBlock
from edgeprune.calibration import LayerMoments
from edgeprune.compat import VisionTransformer
from edgeprune.reducers import Reduction
from edgeprune.shelf import MEMORY, Item, Shelf
from edgeprune.types import PLAIN, REDUCER, Form, Levels, Ranges, SubBlock

DATABASE_BYTES = 1 << 30  # sub-blocks that a database holds; the one that nobody asked for longest goes first
STREAM_BYTES = 1 << 30  # residual streams that a judge may hold: bounds the images it looks at

#: A residual stream `[n, tokens, width]`, and what became of the tokens up to there.
State = tuple[Tensor, Reduction]

#: Which option of every sub-block, in the order attn 0, mlp 0, attn 1, ...
Choice = tuple[int, ...]


class Database:
    """Every sub-block at every level, re-fitted on the dense model's inputs; made when asked for, and kept while there is room."""

    def __init__(
        self,
        dense: VisionTransformer,
        levels: Sequence[Levels],
        counts: Sequence[Sequence[int]],
        moments: Mapping[SubBlock, LayerMoments],
        patches: Sequence[Sequence[int | None]] | None = None,
        reducer: str = REDUCER,
        forms: Sequence[Sequence[Form]] = (),
        ranges: Ranges | None = None,
        inputs: Mapping[int, LayerMoments] | None = None,
    ) -> None:
        """counts: how many units each option of each sub-block keeps, in the order of `levels`; patches: and how many
        patch tokens then stay, None for all that come in; forms: and how it computes, () = all plain, with the `ranges`
        of the dense model's inputs for int8, and the moments of the attentions' `inputs` for lower ranks.
        """
        self.dense, self.levels, self.counts, self.moments = dense, levels, counts, moments
        self.forms, self.ranges, self.inputs = forms, ranges or {}, inputs or {}
        self.patches, self.reducer = patches or [[None] * len(own) for own in counts], reducer
        self.sizes = vit.anatomy(dense)
        self._made: dict[tuple[int, int], nn.Module] = {}  # the one asked for last is the last
        self._bytes = 0

    @torch.no_grad()
    def sub_block(self, at: int, option: int) -> nn.Module:
        """Attention or MLP of sub-block `at` (the dense one if nothing is removed)."""
        made = self._made.pop((at, option), None)
        if made is None:
            made = self._make(at, option)
            self._bytes += _size(made)
        self._made[at, option] = made
        while self._bytes > DATABASE_BYTES and len(self._made) > 1:
            self._bytes -= _size(self._made.pop(next(iter(self._made))))
        return made

    def _make(self, at: int, option: int) -> nn.Module:
        level = self.levels[at]
        kept = level.kept(self.counts[at][option])
        form = self.forms[at][option] if self.forms else PLAIN
        if form == PLAIN:
            return self._sliced(level, kept)
        made = copy.deepcopy(self._sliced(level, kept))
        if form.rank is not None:
            mixed = lowrank.of_heads(self.moments[level.at], kept, made.head_dim)
            lowrank.reduce(made, form.rank, self.inputs[level.block], mixed)
        if form.int8:
            for layer, own in zip(quantisation.convert(made, level.kind), self.ranges[level.at], strict=True):
                layer.set_range(*own)
        return made

    def _sliced(self, level: Levels, kept: tuple[int, ...]) -> Any:
        block = self.dense.blocks[level.block]
        if len(kept) == self.sizes.units(level.at):
            return vit.sub_block(block, level.kind)
        made = vit.slice_sub_block(block, level.at, kept, self.sizes)
        mean, hessian = self.moments[level.at]
        layer = vit.output_layer(block, level.kind)
        columns = vit.columns(kept, self.sizes.unit_size(level.at))
        vit.write_output(made, level.kind, *obs.refit(layer.weight, layer.bias, mean, hessian, columns))
        return made

    def reduction(self, at: int, option: int, before: Tensor, after: Tensor, sub: Any) -> Reduction | None:
        """What becomes of the tokens after sub-block `at`, from the residual streams around it; None if all stay."""
        patches = self.patches[at][option]
        if patches is None:
            return None
        normed = cast(Any, self.dense.blocks[self.levels[at].block]).norm1(before)
        return vit.reduction(sub, normed, after, self.sizes.prefix, patches, self.reducer)


def _size(sub: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in sub.parameters())


def most_images(sizes: vit.Anatomy) -> int:
    """How many images' residual streams `STREAM_BYTES` hold; at least two."""
    return max(2, STREAM_BYTES // (4 * sizes.streamed))


class Judge:
    """KL divergence from the dense model on fixed images; each choice is computed once, from where it is new.

    Residual streams of the choice last given to `keep` are held, one per sub-block, so that a choice that
    shares its first blocks costs only the others.
    """

    def __init__(
        self,
        database: Database,
        images: Tensor,
        teacher: VisionTransformer | None = None,
        shelf: Shelf = MEMORY,
    ) -> None:
        """images: `[n, channels, height, width]`; no more are used than `STREAM_BYTES` of residual streams allow.

        teacher: the model to stay close to, if that is not the one that is stitched from; shelf: where streams wait.
        """
        images = images[: most_images(database.sizes)]
        self.database, self.shelf = database, shelf
        self.judged = 0  # the first image that is judged
        with torch.no_grad(), products.rounded():
            self.start: State = (vit.embed(database.dense, images), vit.as_it_is)
            self.wanted = self._ask(teacher or database.dense, images)
        self.known: dict[Choice, float] = {}
        self.kept: Choice = ()
        self.streams: list[tuple[Item, Reduction]] = [self._put(self.start)]

    def _ask(self, teacher: VisionTransformer, images: Tensor) -> Tensor:
        """What the models shall answer: logits, or embeddings."""
        *_, logits = vit.streams(teacher, images)
        return logits

    @torch.no_grad()
    def divergence(self, choice: Choice) -> float:
        """Mean KL(dense || stitched) over the images, in nats."""
        if choice not in self.known:
            self.known[choice] = self._run(choice, None)
        return self.known[choice]

    @torch.no_grad()
    def keep(self, choice: Choice) -> None:
        """Hold this choice's residual streams for its neighbours."""
        if choice != self.kept:
            streams: list[tuple[Item, Reduction]] = []
            self.known[choice] = self._run(choice, streams)
            self.kept, self.streams = choice, streams

    def _put(self, state: State) -> tuple[Item, Reduction]:
        return self.shelf.put(state[0]), state[1]

    @products.rounded()
    def _run(self, choice: Choice, streams: list[tuple[Item, Reduction]] | None) -> float:
        shared = self._shared(choice)
        stream, so_far = self.streams[shared]
        state: State = (stream(), so_far)
        if streams is not None:
            streams += self.streams[: shared + 1]
        for at in range(shared, len(choice)):
            state = self._step(at, choice, *state)
            if streams is not None:
                streams.append(self._put(state))
        own, wanted = self._classify(state[0])[self.judged :], self.wanted[self.judged :]
        return float(tasks.divergence(own, wanted, tasks.of(self.database.dense))) / len(own)

    def _classify(self, x: Tensor) -> Tensor:
        return vit.classify(self.database.dense, x)

    def _shared(self, choice: Choice) -> int:
        """How many sub-blocks leave the stream as it was with the choice that is held."""
        shared = 0
        while shared < len(self.streams) - 1 and self.kept[shared] == choice[shared]:
            shared += 1
        return shared

    def _step(self, at: int, choice: Choice, x: Tensor, so_far: Reduction) -> State:
        level = self.database.levels[at]
        sub = self.database.sub_block(at, choice[at])
        x = self._entered(at, x)
        after = vit.step(self.database.dense.blocks[level.block], level.kind, x, sub)
        return self._reduce(at, choice, x, after, sub, so_far)

    def _entered(self, at: int, x: Tensor) -> Tensor:
        level = self.database.levels[at]
        return vit.entered(self.database.dense.blocks[level.block], x) if level.kind == "attn" else x

    def _reduce(self, at: int, choice: Choice, x: Tensor, after: Tensor, sub: Any, so_far: Reduction) -> State:
        own = self.database.reduction(at, choice[at], x, after, sub)
        return (after, so_far) if own is None else (own(after), vit.chained(so_far, own))


class RefitJudge(Judge):
    """The same after the refit of last layers and classifier, as in `recovery.sequential`.

    It is fitted to the first images and judged on the second. First layers are left out: they cost as much again,
    which is as many plans less.
    """

    def __init__(
        self,
        database: Database,
        first: Tensor,
        second: Tensor,
        weights: Mapping[SubBlock, Sequence[Tensor]] | None = None,
        teacher: VisionTransformer | None = None,
        shelf: Shelf = MEMORY,
    ) -> None:
        """weights: how much each token of the first and of the second images counts, per sub-block `[n, tokens]`."""
        super().__init__(database, torch.cat([first, second]), teacher, shelf)
        self.judged = min(len(first), len(self.wanted) - 1)
        self.weights = {at: torch.cat(list(parts))[: len(self.wanted)] for at, parts in (weights or {}).items()}

    def _ask(self, teacher: VisionTransformer, images: Tensor) -> Tensor:
        self.targets: list[Item] = []  # the teacher's residual streams, after every sub-block
        stream = vit.embed(teacher, images)
        for level in self.database.levels:
            stream = vit.walk(teacher, level.at, stream)
            self.targets.append(self.shelf.put(stream))
        return vit.classify(teacher, stream)

    def _classify(self, x: Tensor) -> Tensor:
        model = self.database.dense
        if not recovery.has_plain_head(model):
            return vit.classify(model, x)
        head = copy.deepcopy(cast(nn.Linear, model.head))
        return torch.cat(list(recovery.refit_head(model, head, self._split(x), self._split(self.wanted), 1, False)[1]))

    def _split(self, part: Tensor) -> list[Tensor]:
        """First and second images."""
        return [part[: self.judged], part[self.judged :]]

    def _shared(self, choice: Choice) -> int:
        shared = super()._shared(choice)
        while shared and self._removed(shared - 1, choice):
            shared -= 1
        return shared

    def _removed(self, at: int, choice: Choice) -> bool:
        return not self.database.counts[at][choice[at]]

    def _left_to_next(self, at: int, choice: Choice) -> bool:
        """Whether only a bias stays here and next: of biases in a row, the last makes up for all, but not across a merge."""
        if not self._removed(at, choice) or at + 1 == len(choice) or not self._removed(at + 1, choice):
            return False
        level = self.database.levels[at + 1]
        return level.kind == "mlp" or not isinstance(self.database.dense.blocks[level.block], MergingBlock)

    def _step(self, at: int, choice: Choice, x: Tensor, so_far: Reduction) -> State:
        x = self._entered(at, x)
        if self._left_to_next(at, choice):
            return x, so_far
        level = self.database.levels[at]
        block, kind = self.database.dense.blocks[level.block], level.kind
        sub = copy.deepcopy(self.database.sub_block(at, choice[at]))
        counts = vit.reduced_rows(self.weights[level.at], so_far) if self.weights else torch.ones(x.shape[:2])
        have, wanted, counted = (self._split(part) for part in (x, so_far(self.targets[at]()), counts))
        place = recovery.Place(block, kind, sub)
        after = torch.cat(list(recovery.refit_sub_block(place, have, wanted, counted, 1, False)[1]))
        return self._reduce(at, choice, x, after, sub, so_far)

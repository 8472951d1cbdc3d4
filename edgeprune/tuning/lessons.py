"""Lessons: shuffled batches of images with what the teacher says of them.

Asking the teacher is most of the work of tuning a small student, so an answer is kept where the same view of
the image comes again and all answers fit in memory. The view of an image depends on the seed, the number of the
view and the image alone: not on batches, loader workers or processes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from edgeprune.console import SILENT, Console
from edgeprune.data import Corrupt, Images
from edgeprune.tuning.loss import Targets

CACHE_BYTES = 2 << 30  # pixels and teacher outputs above this size are computed again in every epoch

ECHO_LESSONS = 64  # that are collected before they are given again

#: Pixels `[n, channels, height, width]`, labels `[n]`, what the teacher says of them.
Lesson = tuple[Tensor, Tensor, Targets | None]


@dataclass
class Views(Images):
    """`Images` under a random transform that is drawn for each image from `seed` and `view` alone."""

    seed: int = 0
    view: int = 0

    def __getitem__(self, i: int) -> tuple[Tensor, int] | Corrupt:
        state = hash((self.seed, self.view, i)) & 0xFFFFFFFF
        random.seed(state)  # timm's augmentation draws from all three
        np.random.seed(state)
        torch.default_generator.manual_seed(state)
        return super().__getitem__(i)


@dataclass
class Store:
    """What is known of one view of every image."""

    pixels: Tensor
    labels: Tensor
    targets: Targets | None
    have: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [images]

    @staticmethod
    def like(lesson: Lesson, count: int) -> Store:
        """Room for `count` images; the teacher's outputs are kept as float16."""
        pixels, labels, targets = lesson

        def room(x: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, *x.shape[1:], dtype=dtype)

        kept = targets and Targets(
            room(targets.logits, torch.float32), tuple(room(x, torch.float16) for x in targets.tokens)
        )
        return Store(room(pixels, pixels.dtype), room(labels, labels.dtype), kept, np.zeros(count, bool))

    def put(self, at: np.ndarray, lesson: Lesson) -> None:
        pixels, labels, targets = lesson
        where = torch.from_numpy(at)
        self.pixels[where], self.labels[where] = pixels, labels
        if targets is not None and self.targets is not None:
            self.targets.logits[where] = targets.logits.cpu()
            for kept, new in zip(self.targets.tokens, targets.tokens, strict=True):
                kept[where] = new.cpu().half()
        self.have[at] = True

    def get(self, at: np.ndarray) -> Lesson:
        where = torch.from_numpy(at)
        return self.pixels[where], self.labels[where], None if self.targets is None else self.targets[where]


@dataclass
class Lessons:
    """An endless iterator over lessons; every image once per epoch, each epoch in another order.

    Of each batch, process `rank` of `size` gets its share, which may be empty. Raises UsageError once more
    than 1 % of the images cannot be read.
    """

    images: Images  # under the training transform
    batch_size: int
    epochs: float  # how many will be asked for: whether answers will be needed again
    views: int  # different random views of an image; 0 = a new one in every epoch
    seed: int
    ask: Callable[[Tensor], Targets] | None = None
    rank: int = 0
    size: int = 1
    echo: int = 1  # how often a lesson is given where views are not kept; data echoing, arXiv 1907.05550
    workers: int = 0
    console: Console = SILENT
    room: int | None = None  # bytes of lessons that are kept; None = CACHE_BYTES
    keep: bool | None = None  # None = not known yet

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Lesson]:
        """Lessons; with `echo`, some are collected on the way and then given again, in another order."""
        return self.after(0)

    def after(self, count: int) -> Iterator[Lesson]:
        """The lessons that follow the first `count`; of those, only what later ones need is computed."""
        if self.echo < 2 or self.views:
            yield from self._fresh(count)
        done = 0
        if count:
            per_chunk = self._echoed(next(self._fresh(0)))
            done = count // (per_chunk * self.echo)
            count -= done * per_chunk * self.echo
            fresh = self._fresh(done * per_chunk)
        else:
            fresh = self._fresh(0)
        for chunk in itertools.count(done):
            for lesson in self._chunk(fresh, chunk):
                if count:
                    count -= 1
                else:
                    yield lesson

    def _chunk(self, fresh: Iterator[Lesson], chunk: int) -> Iterator[Lesson]:
        given: list[Lesson] = []
        for lesson in fresh:
            yield lesson
            given.append(lesson)
            if len(given) >= self._echoed(given[0]):
                break
        for again in range(1, self.echo):
            for i in np.random.default_rng([self.seed, chunk, again]).permutation(len(given)):
                yield given[i]

    def _echoed(self, lesson: Lesson) -> int:
        """How many lessons are collected before they are given again."""
        share = math.ceil(self.batch_size / self.size)
        fit = int(self._room // max(1, share * _bytes_per_image(lesson)))
        return max(1, min(ECHO_LESSONS, fit, math.ceil(self.per_epoch * self.epochs / self.echo)))

    def _fresh(self, skip: int) -> Iterator[Lesson]:
        """New lessons, without the first `skip`: their answers are only computed where they are kept."""
        stores: dict[int, Store] = {}
        for epoch in itertools.count():
            view = epoch if self.keep is False or not self.views else epoch % self.views
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            batches = [
                order[i : i + self.batch_size][self.rank :: self.size] for i in range(0, len(order), self.batch_size)
            ]
            drop = min(skip, len(batches))
            skip -= drop
            if self.keep is False or not self.views or epoch >= self.views:
                batches, drop = batches[drop:], 0
            if batches:
                yield from itertools.islice(self._epoch(view, batches, stores), drop, None)

    def _epoch(self, view: int, batches: list[np.ndarray], stores: dict[int, Store]) -> Iterator[Lesson]:
        store = stores.get(view)
        unknown = [batch if store is None else batch[~store.have[batch]] for batch in batches]
        for batch, new, items in zip(batches, unknown, self._load(view, unknown), strict=True):
            at, lesson = self._answer(new, items)
            if store is None and at.size and self._keeps(lesson):
                store = stores[view] = Store.like(lesson, len(self.images))
            if store is None:
                yield lesson
                continue
            if at.size:
                store.put(at, lesson)
            yield store.get(batch[store.have[batch]])

    def _load(self, view: int, batches: list[np.ndarray]) -> Iterator[list[Any]]:
        """The transformed images of each batch."""
        if not any(batch.size for batch in batches):
            return itertools.repeat([], len(batches))
        images = self.images
        views = Views(images.source, images.indices, images.transform, images.what, images.corrupt, self.seed, view)
        rows = [batch.tolist() for batch in batches]
        return iter(DataLoader(views, batch_sampler=rows, num_workers=self.workers, collate_fn=list))

    def _answer(self, at: np.ndarray, items: list[Any]) -> tuple[np.ndarray, Lesson]:
        """The readable ones of the images `at`, and the lesson they make."""
        good = [not isinstance(item, Corrupt) for item in items]
        for item in items:
            if isinstance(item, Corrupt):
                self.images.note(item)
        items = list(itertools.compress(items, good))
        if not items:
            return at[:0], (torch.empty(0), torch.empty(0, dtype=torch.long), None)
        pixels, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
        return at[good], (pixels, labels, None if self.ask is None else self.ask(pixels))

    @property
    def _room(self) -> int:
        return CACHE_BYTES if self.room is None else min(self.room, CACHE_BYTES)

    def _keeps(self, lesson: Lesson) -> bool:
        """Whether answers are kept: found out once, at the first lesson."""
        if self.keep is None:
            size = _bytes_per_image(lesson) * len(self.images) * max(self.views, 1)
            comes_again = 0 < self.views < self.epochs
            self.keep = comes_again and size <= self._room
            if comes_again and not self.keep:
                self.console.say(
                    f"images and teacher outputs are not kept: {size / 2**30:.1f} GiB is above {self._room / 2**30:.1f} GiB"
                )
        return self.keep


def _bytes_per_image(lesson: Lesson) -> int:
    """Memory that a lesson's pixels and teacher outputs take per image, tokens as float16; 0 for an empty one."""
    pixels, labels, targets = lesson
    if not len(labels):
        return 0
    return 4 * pixels[0].numel() + 2 * (sum(x[0].numel() for x in targets.tokens) if targets else 0)

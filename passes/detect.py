"""Find chains: runs of isomorphic blocks, each fed by the one before.

The sequence of ops proposes runs (`periods.py`). Within a run every argument of every op is bound to what it is in terms
of its block (`bindings.py`); blocks with equal bindings are isomorphic (`isomorphism.py`) and become the record of a chain
(`assembly.py`). The first block that differs ends the chain, and what differs is the reason in the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from pcr_fx.chain import NearMiss
from pcr_fx.graphs.effects import updates_statistics, writes
from pcr_fx.graphs.nodes import op_name
from pcr_fx.passes.assembly import FoundChain, assemble_chain
from pcr_fx.passes.bindings import Blocks, Broken, Carried, NotCarried, OpSequence, names_of
from pcr_fx.passes.completion import complete_last_block
from pcr_fx.passes.describe import common_modules, describe_node, describe_source, module_path, module_range
from pcr_fx.passes.isomorphism import Isomorphism
from pcr_fx.passes.kinds import target_of
from pcr_fx.passes.periods import Run, find_runs
from pcr_fx.passes.phases import best_phase
from pcr_fx.passes.statistics import update_apart
from pcr_fx.passes.varying_numbers import write_numbers_out
from pcr_fx.passes.wholes import carry_wholes

# By how much an attempt may be longer than the chain known so far. So the work is in proportion to what is found.
_GROWTH = 8
# Last blocks that are completed one after the other: of two states that wait for each other the last two blocks lack some.
_COMPLETIONS = 4
# How many kinds of ops in a block may have to be written out, one after the other is found.
_MOST_WRITTEN = 6


@dataclass
class Detection:
    """What `find_chains` found."""

    chains: list[FoundChain] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)


def find_chains(graph: fx.Graph, attributes: dict[str, Any], min_length: int, guarded: bool = False) -> Detection:
    """Every chain of at least `min_length` blocks, and the near misses.

    Args:
        graph: a normalised graph. Where a last block lacks what nobody reads of it, that is put into it; ops whose numbers change
            from block to block are written out in others (`varying_numbers.py`), and running statistics updated apart.
        attributes: the value of each `get_attr` target.
        min_length: the fewest blocks worth a chain.
        guarded: whether the graph is only called with tensors of the sizes that it was captured with, where those are numbers.
    """
    detector = _Detector(OpSequence(graph, attributes), min_length)
    detection = detector.run()
    for _ in range(_MOST_WRITTEN):
        is_written = write_numbers_out(list(detector.sequence.varying))
        if not update_apart(detector.updating) and not is_written:
            break
        detector = _Detector(OpSequence(graph, attributes), min_length)
        detection = detector.run()
    for _ in range(_COMPLETIONS):
        completed = [complete_last_block(taken.blocks, taken.length, guarded) for taken in detector.taken]
        if not any(completed):
            break
        detector = _Detector(OpSequence(graph, attributes), min_length)
        detection = detector.run()
    carried = [carry_wholes(taken.found, detector.sequence.value, guarded) for taken in detector.taken]
    detection.chains = [found for found in carried if not isinstance(found, str)]
    detection.near_misses += [
        NearMiss(taken.found.chain.origin.modules, reason, taken.length, taken.blocks.source())
        for taken, reason in zip(detector.taken, carried, strict=True)
        if isinstance(reason, str)
    ]
    return detection


@dataclass(frozen=True, eq=False)
class _Taken:
    """A chain that was claimed, and why the block behind it is none of it, if its wiring says so."""

    blocks: Blocks
    found: FoundChain
    broken: Broken | None

    @property
    def length(self) -> int:
        return self.found.chain.length

    @property
    def stop(self) -> int:
        return self.blocks.start + self.length * self.blocks.period


class _Detector:
    def __init__(self, sequence: OpSequence, min_length: int) -> None:
        self.sequence, self.min_length = sequence, min_length
        self.claimed: set[int] = set()
        self.taken: list[_Taken] = []
        # Near misses by where they start and stop: a longer period may yet make a chain of the same ops.
        self.misses: dict[tuple[int, int], NearMiss] = {}
        # Ops of blocks that are no chain because of the running statistics that they update.
        self.updating: list[fx.Node] = []

    def run(self) -> Detection:
        kinds = [self.sequence.kinds.of(node) for node in self.sequence.ops]
        for run in find_runs(kinds, max(2, min(self.min_length, 3))):
            for start, stop in self._unclaimed(run):
                self._search(Run(start, stop, run.period))
        self.taken.sort(key=lambda taken: taken.blocks.start)
        self._miss_by_target()
        near_misses = [*self._notes(), *self._remaining_misses()]
        return Detection([taken.found for taken in self.taken], near_misses)

    # --- searching -------------------------------------------------------------------------------------------------

    def _unclaimed(self, run: Run) -> Iterator[tuple[int, int]]:
        start = None
        for index in range(run.start, run.stop + 1):
            free = index < run.stop and index not in self.claimed
            if free and start is None:
                start = index
            elif not free and start is not None:
                if index - start >= 2 * run.period:
                    yield start, index
                start = None

    def _search(self, run: Run) -> None:
        """Chains within one run. What ends a chain is passed, and the search goes on behind it."""
        start = run.start + best_phase(self.sequence, run)
        count = (run.stop - start) // run.period
        first = 0
        while count - first >= 2:
            first += self._take(Blocks(self.sequence, start + first * run.period, run.period, count - first))

    def _take(self, blocks: Blocks) -> int:
        """Claim the chain that starts with the first of `blocks`; the number of blocks that are dealt with."""
        taken, attempt = None, min(blocks.count, max(self.min_length, 2))
        while True:
            length, found, broken = self._longest(blocks, attempt)
            if found is None or length < self.min_length:
                break
            taken = _Taken(blocks, found, broken)
            if broken is not None or length == blocks.count:
                break
            attempt = min(blocks.count, _GROWTH * attempt)
        if taken is None:
            self._miss(blocks, length, broken)
            return max(length, 1)
        self.taken.append(taken)
        self.claimed.update(self.sequence.position[node] for node in taken.found.nodes)
        return taken.length

    def _longest(self, blocks: Blocks, length: int) -> tuple[int, FoundChain | None, Broken | None]:
        """How many of the first `length` blocks make a chain, that chain, and what is wrong with the block behind."""
        broken: Broken | None = None
        while True:
            try:
                isomorphism = Isomorphism(blocks, length)
                broken = isomorphism.broken or broken
                length = isomorphism.length
                return length, assemble_chain(isomorphism), broken
            except Broken as ended:
                broken = ended
                if ended.block < 2 or ended.block >= length:
                    return min(ended.block, 1), None, broken
                length = ended.block

    # --- saying why not --------------------------------------------------------------------------------------------

    def _miss(self, blocks: Blocks, length: int, broken: Broken | None) -> None:
        """Remember why no chain starts here: once for a run, and only for what has the makings of a chain."""
        start, stop = blocks.start, blocks.start + blocks.period * blocks.count
        if any(first <= start < last for first, last in self.misses):
            return
        if length >= 2 or broken is None:
            length = max(length, 2)
            reason = f"too short: {length} blocks, min_length={self.min_length}"
            differs = broken.reason if broken is not None else self._odd_behind(blocks, length)
            reason += f"; the next block differs: {differs}" if differs else ""
        elif blocks.count < self.min_length:
            return
        elif isinstance(broken, NotCarried):
            # Alike ops that do not feed each other are no near miss of anything, unless they do so unseen.
            reason = self._handed_on_in_memory(blocks)
            if not reason:
                return
        else:
            reason = broken.reason
            if broken.node is not None and updates_statistics(broken.node):
                self.updating += filter(updates_statistics, blocks.ops(0, blocks.count))
        modules = blocks.modules(0, length if length >= 2 else blocks.count)
        self.misses[start, stop] = NearMiss(modules, reason, blocks.count, blocks.source())

    def _handed_on_in_memory(self, blocks: Blocks) -> str:
        """That each block reads what the one before wrote somewhere, in words, with advice; nothing where it does not."""
        ops = blocks.ops(1, 2)
        writer = next(filter(writes, ops), None)
        reads = any(source in self.sequence.written for op in ops if not writes(op) for source in op.all_input_nodes)
        if writer is None or not reads:
            return ""
        return (
            f"mutation: {describe_node(writer)} writes to {names_of(writes(writer))}, by which the blocks hand on their state; "
            "keep the state in a variable of its own, and stack what is to be returned behind the loop"
        )

    def _remaining_misses(self) -> Iterator[NearMiss]:
        """The near misses of which no chain has come after all."""
        for (start, stop), miss in sorted(self.misses.items(), key=lambda item: item[0]):
            claimed = sum(1 for index in range(start, stop) if index in self.claimed)
            if 2 * claimed < stop - start:
                yield miss

    def _miss_by_target(self) -> None:
        """Runs of the same ops on other shapes: near misses, since the shapes must be one."""
        targets: list[Any] = [target_of(node) for node in self.sequence.ops]
        for index in self.claimed:
            targets[index] = index
        for run in find_runs(targets, self.min_length):
            start = run.start + best_phase(self.sequence, run)
            blocks = Blocks(self.sequence, start, run.period, (run.stop - start) // run.period)
            known = any(first < run.stop and run.start < last for first, last in self.misses)
            if known or blocks.count < self.min_length:
                continue
            differs = next(filter(None, (self._odd(blocks, block) for block in range(1, blocks.count))), "")
            if differs and self._feed_each_other(blocks):
                words = f"blocks of the same ops that differ: {differs}"
                miss = NearMiss(blocks.modules(0, blocks.count), words, blocks.count, blocks.source())
                self.misses[run.start, run.stop] = miss

    def _feed_each_other(self, blocks: Blocks) -> bool:
        leaves = (leaf for node in blocks.ops(1, 2) for leaf in self.sequence.leaves(node))
        return any(isinstance(blocks.bind(1, leaf), Carried) for leaf in leaves)

    def _notes(self) -> Iterator[NearMiss]:
        """The odd blocks before and behind chains."""
        said: set[int] = set()
        for number, taken in enumerate(self.taken):
            before = self.taken[number - 1].stop if number else 0
            after = self.taken[number + 1].blocks.start if number + 1 < len(self.taken) else len(self.sequence.ops)
            name = taken.found.chain.origin.modules
            start, period = taken.blocks.start, taken.blocks.period
            for odd, reason, words in (
                (range(max(before, start - period), start), self._odd_before(taken, before), f"stands before {name}"),
                (
                    range(taken.stop, min(after, taken.stop + period)),
                    self._end(taken, number),
                    f"ends the chain {name}",
                ),
            ):
                ops = self.sequence.ops[odd.start : odd.stop]
                if reason and ops and said.isdisjoint(odd):
                    said.update(odd)
                    yield NearMiss(module_range([ops]), f"{words}: {reason}", 1, describe_source(ops[-1]))

    def _end(self, taken: _Taken, number: int) -> str:
        """Why the block behind a chain is none of it."""
        if taken.broken is not None:
            return taken.broken.reason
        following = self.taken[number + 1] if number + 1 < len(self.taken) else None
        if following is not None and following.found.chain.origin.ops == taken.found.chain.origin.ops:
            odd = self.sequence.ops[taken.stop : following.blocks.start]
            if 0 < len(odd) <= 2 * taken.blocks.period:
                return self._difference(taken.blocks, odd)
        return self._odd_behind(taken.blocks, taken.length)

    def _odd_behind(self, blocks: Blocks, length: int) -> str:
        """What sets the ops behind the last block apart from a block; empty where they are nothing like one."""
        start = blocks.start + length * blocks.period
        ops = self.sequence.ops[start : start + blocks.period]
        resembles = self._resemble(blocks, length - 1, range(start, start + len(ops)))
        return self._difference(blocks, ops) if resembles else ""

    def _odd_before(self, taken: _Taken, free: int) -> str:
        """What sets the ops before the first block apart from a block."""
        start = taken.blocks.start - taken.blocks.period
        odd = range(max(start, 0), taken.blocks.start)
        if start < free or not self._resemble(taken.blocks, 0, odd):
            return ""
        differs = self._difference(taken.blocks, self.sequence.ops[odd.start : odd.stop])
        miss = next((miss for (first, last), miss in self.misses.items() if first == odd.start), None)
        return differs or (miss.reason if miss is not None else "")

    def _resemble(self, blocks: Blocks, block: int, odd: range) -> bool:
        """Whether some ops that no chain has resemble the neighbour of a block: in name, or in most ops."""
        free = [self.sequence.ops[index] for index in odd if index not in self.claimed]
        if not free:
            return False
        usual = Counter(map(target_of, blocks.ops(block, block + 1)))
        common = (usual & Counter(map(target_of, free))).total()
        path = common_modules(blocks.ops(block, block + 1))
        other = module_path(free[0]).split(".")[: len(path)]
        neighbours = bool(path) and path[:-1] == other[:-1] and path[-1].isdigit() and other[-1].isdigit()
        return common * 3 >= blocks.period * (1 if neighbours else 2)

    def _odd(self, blocks: Blocks, block: int) -> str:
        return self._difference(blocks, blocks.ops(block, block + 1))

    def _difference(self, blocks: Blocks, odd: list[fx.Node]) -> str:
        """The first op that differs from those of the first block, in words."""
        for usual, node in zip(blocks.ops(0, 1), odd, strict=False):
            words = self.sequence.kinds.difference(usual, node)
            if words:
                return words
        missing = blocks.ops(0, 1)[len(odd) :]
        return f"{op_name(missing[0])} is missing" if missing else ""

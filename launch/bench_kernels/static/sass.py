"""What a compiled kernel consists of, read from its cubin: instructions, loops, registers.

Needs NVIDIA's nvdisasm and cuobjdump, which the triton wheel brings; no GPU and no CUDA toolkit.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.errors import InputError

TENSOR_CORE = {"HGMMA": "HGMMA", "QGMMA": "HGMMA", "HMMA": "HMMA", "IMMA": "HMMA"}
"""Base opcodes of matrix instructions and the name each is reported under; UTC*MMA apart."""
LOADS = ("LDG", "LDGSTS", "LD")
STORES = ("STG", "ST")

_TEXT = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^\s*\.(L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_TARGET = re.compile(r"\(\.(L_\w+)\)")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One SASS instruction."""

    opcode: str
    """With its modifiers, e.g. LDG.E.128."""
    target: str | None
    """Label that it jumps to or calls."""
    conditional: bool
    """Whether the next instruction may follow even if this one ends a block."""

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bits that one thread moves, if this is a load or a store."""
        for part in self.opcode.split(".")[1:]:
            if match := re.fullmatch(r"[US]?(8|16|64|128|256)", part):
                return int(match[1])
        return 32


@dataclass(frozen=True, kw_only=True)
class Code:
    """Instructions of a kernel, or of one loop of it."""

    instructions: Sequence[Instruction]

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each base opcode stands there."""
        return Counter(instruction.base for instruction in self.instructions)

    def widths(self, opcodes: Iterable[str]) -> dict[int, int]:
        """Bits of an access to how many instructions make it, widest first."""
        found = Counter(i.width for i in self.instructions if i.base in opcodes)
        return dict(sorted(found.items(), reverse=True))

    @property
    def tensor_core(self) -> dict[str, int]:
        """Matrix instructions by kind: HMMA, HGMMA (wgmma), UTCMMA (tcgen05)."""
        found: Counter[str] = Counter()
        for base, count in self.counts.items():
            kind = "UTCMMA" if re.fullmatch(r"UTC\w*MMA", base) else TENSOR_CORE.get(base)
            if kind is not None:
                found[kind] += count
        return dict(found)

    @property
    def bulk_loads(self) -> int:
        """UTMALDG: loads of whole tiles by the tensor memory accelerator."""
        return self.counts["UTMALDG"]

    @property
    def bulk_stores(self) -> int:
        return self.counts["UTMASTG"] + self.counts["UTMAREDG"]

    @property
    def local_accesses(self) -> int:
        """LDL and STL: what registers could not hold."""
        return self.counts["LDL"] + self.counts["STL"]


@dataclass(frozen=True, kw_only=True)
class Kernel(Code):
    """One kernel of a cubin."""

    name: str
    registers: int
    stack_bytes: int
    """Per thread."""
    shared_bytes: int
    """Static shared memory of a block; what a launch adds is not in the cubin."""
    loops: Sequence[Code]
    """Natural loops, innermost (shortest) first."""

    def main_width(self, opcodes: Iterable[str]) -> int | None:
        """Bits of the accesses that move most bytes: of those in loops where any are, else of all.

        None without such accesses. What a loop does once per round outweighs what surrounds it.
        """
        inside = {id(i): i for loop in self.loops for i in loop.instructions}
        looped = Code(instructions=list(inside.values())).widths(opcodes)
        widths = looped or self.widths(opcodes)
        return max(widths, key=lambda bits: bits * widths[bits], default=None)

    @property
    def spill_bytes(self) -> int:
        """Bytes per thread that live in local memory: the stack, where anything accesses it."""
        return self.stack_bytes if self.local_accesses else 0


def read_cubin(cubin: Path, tools: Path) -> list[Kernel]:
    """The kernels of `cubin`.

    Args:
        cubin: file that ptxas wrote.
        tools: folder of nvdisasm and cuobjdump.

    Raises:
        InputError: the tools are missing or cannot read the file.
    """
    text = _run(tools / "nvdisasm", "-c", str(cubin))
    usage = _run(tools / "cuobjdump", "-res-usage", str(cubin))
    resources = {name: tuple(map(int, rest)) for name, *rest in _USAGE.findall(usage)}
    kernels = []
    for name, lines in _sections(text).items():
        if name not in resources:
            continue
        registers, stack, shared = resources[name]
        instructions, labels = parse(lines)
        kernels.append(
            Kernel(
                instructions=instructions,
                name=name,
                registers=registers,
                stack_bytes=stack,
                shared_bytes=shared,
                loops=find_loops(instructions, labels),
            )
        )
    if not kernels:
        raise InputError(f"{cubin}: {tools / 'nvdisasm'} finds no kernel in it; is triton newer?")
    return kernels


def parse(lines: Iterable[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of one kernel, and the number of the instruction that each label marks."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            predicate = _PREDICATE.match(found[2])
            body = found[2][predicate.end() :] if predicate else found[2]
            opcode, _, operands = body.partition(" ")
            target = _TARGET.search(operands)
            # BRA.U UP0, L and BRA.DIV UR4, L test an operand instead of a predicate.
            tested = target is not None and operands.strip().find("`") > 0
            jump = target[1] if target and opcode.split(".")[0] in ("BRA", "CALL", "JMP") else None
            called = opcode.startswith("CALL")
            instructions.append(Instruction(opcode, jump, bool(predicate) or tested or called))
    return instructions, labels


def find_loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Code]:
    """Natural loops of the control flow, shortest first.

    A jump backwards is a loop only if its target dominates it: the compiler moves unlikely blocks
    behind the end of a kernel, and they jump back too. A jump to itself, which pads the end of
    every kernel, is none.
    """
    starts = _block_starts(instructions, labels)
    number = {start: block for block, start in enumerate(starts)}
    ends = [*starts[1:], len(instructions)]
    successors = [_successors(instructions, labels, end, number) for end in ends]
    dominators = _dominators(successors)
    bodies: dict[int, set[int]] = {}
    for block, following in enumerate(successors):
        for head in following:
            itself = head == block and ends[block] - starts[block] == 1
            if block in dominators and head in dominators[block] and not itself:
                bodies.setdefault(head, {head}).update(_body(head, block, successors))
    loops = [
        Code(
            instructions=[
                i for block in sorted(body) for i in instructions[starts[block] : ends[block]]
            ]
        )
        for body in bodies.values()
    ]
    return sorted(loops, key=lambda loop: len(loop.instructions))


def _block_starts(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[int]:
    starts = {0, *labels.values()}
    for position, instruction in enumerate(instructions):
        if instruction.target is not None or instruction.base in ("EXIT", "RET"):
            starts.add(position + 1)
    return sorted(start for start in starts if start < len(instructions))


def _successors(
    instructions: Sequence[Instruction], labels: dict[str, int], end: int, number: dict[int, int]
) -> list[int]:
    """Blocks that may run after the one whose last instruction is end - 1."""
    last = instructions[end - 1]
    found = []
    if last.target is not None and labels.get(last.target) in number:
        found.append(number[labels[last.target]])
    ends = last.target is not None or last.base in ("EXIT", "RET")
    if (not ends or last.conditional) and end in number:
        found.append(number[end])
    return found


def _dominators(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached: the blocks that every way to it passes."""
    predecessors: dict[int, list[int]] = {0: []}
    waiting = [0]
    while waiting:
        block = waiting.pop()
        for following in successors[block]:
            if following not in predecessors:
                predecessors[following] = []
                waiting.append(following)
            predecessors[following].append(block)
    everything = set(predecessors)
    dominators = {block: everything if block else {0} for block in sorted(predecessors)}
    changed = True
    while changed:
        changed = False
        for block in dominators:
            if block == 0:
                continue
            found = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    return dominators


def _body(head: int, tail: int, successors: Sequence[Sequence[int]]) -> set[int]:
    """Blocks from which the loop's last block can be reached without passing its first one."""
    body = {head, tail}
    waiting = [tail] if tail != head else []
    while waiting:
        wanted = waiting.pop()
        for block, following in enumerate(successors):
            if wanted in following and block not in body:
                body.add(block)
                waiting.append(block)
    return body


def _sections(text: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := _TEXT.match(line):
            lines = sections.setdefault(start[1], [])
        elif line.startswith("//-----"):
            lines = []
        else:
            lines.append(line)
    return sections


def _run(tool: Path, *arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = subprocess.run(
                [str(tool), *arguments], capture_output=True, text=True, cwd=folder, timeout=300
            )
        except OSError as error:
            raise InputError(f"{tool}: cannot be run: {error.strerror}; reinstall triton") from None
    if result.returncode:
        raise InputError(f"{tool} {' '.join(arguments)}: {result.stderr.strip()[-500:]}")
    return result.stdout

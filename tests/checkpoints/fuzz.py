"""Mutates checkpoints and loads them: ``python tests/checkpoints/fuzz.py FOLDER COUNT SEED``; prints one JSON line.

Every mutant must be refused with a CheckpointError (or, where the tool's files allow it, load into arrays of the right
shape): no other exception, no crash, no growth of memory.
"""

import json
from pathlib import Path
import random
import resource
import struct
import sys
import warnings

sys.path.insert(0, str(Path(__file__).parent))

import checkpoint_writer as writer

from jax_moe import checkpoints

KINDS = [
    ("qwen3_moe", "modelopt", 1),
    ("mixtral", "compressed-tensors", 2),
    ("gpt_oss", "fused", 1),
    ("nemotron_h", "modelopt", 2),
]
NUMBERS = [
    0,
    1,
    -1,
    7,
    15,
    16,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    2**200,
    -(2**63),
    1.5,
    1e308,
]
JUNK = [None, True, "", "x" * 99, [], {}, [[]], "U8", "F4", "BF16", "../x", "/dev/zero", "\0", float("inf"), *NUMBERS]


def mutate_bytes(rng: random.Random, raw: bytes, header: int) -> bytes:
    """Flips, cuts, repeats or drops bytes, mostly in the header."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(header if rng.random() < 0.8 else len(data)) if data else 0
        length = rng.choice([1, 1, 4, 100])
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length]
            case 4:
                data[place:place] = rng.randbytes(length)
            case 5:
                data[:8] = struct.pack(
                    "<Q", rng.choice([0, 1, 8, header - 8, len(data), 2**20, 2**31, 2**63, 2**64 - 1])
                )
    return bytes(data)


def mutate_json(rng: random.Random, tree):
    """Replaces, drops, renames or swaps something somewhere in a JSON tree, in place."""
    path, node = [], tree
    while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.75):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return
    parent, key = path[-1]
    match rng.randrange(4):
        case 0:
            parent[key] = rng.choice(JUNK)
        case 1:
            del parent[key]
        case 2:
            if type(node) is int:
                parent[key] = node + rng.choice([-16, -1, 1, 16, node])
            else:
                parent[key] = [node] * rng.choice([0, 2, 1000])
        case 3:
            other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
            parent[key], parent[other] = parent[other], node


def mutant(rng: random.Random, directory: Path, original: dict[str, bytes]) -> None:
    """Leaves ``directory`` with one file mutated."""
    for name, raw in original.items():
        replace(directory / name, raw)
    name = rng.choice(sorted(original))
    raw = original[name]
    if name.endswith(".json"):
        if rng.random() < 0.3:
            mutated = mutate_bytes(rng, raw, len(raw))
        else:
            tree = json.loads(raw)
            mutate_json(rng, tree)
            mutated = json.dumps(tree).encode()
    else:
        length = 8 + struct.unpack("<Q", raw[:8])[0]
        if rng.random() < 0.5:
            mutated = mutate_bytes(rng, raw, length)
        else:
            header = json.loads(raw[8:length])
            for _ in range(rng.choice([1, 1, 3])):
                mutate_json(rng, header)
            encoded = json.dumps(header).encode()
            mutated = struct.pack("<Q", len(encoded)) + encoded + raw[length:]
    replace(directory / name, mutated)


def replace(path: Path, content: bytes) -> None:
    path.unlink()  # rewriting a file in place makes ext4 wait for the disk
    path.write_bytes(content)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")  # of input scales that a mutation made zero
    rng = random.Random(seed)
    originals, shapes = [], []
    for number, (family, tool, shards) in enumerate(KINDS):
        directory = folder / str(number)
        writer.checkpoint(directory, family, tool, experts=2, hidden=16, intermediate=32, shards=shards)
        originals.append({path.name: path.read_bytes() for path in directory.iterdir()})
        shapes.append(checkpoints.load_experts(directory, 0, progress=False).gate_up.payload.shape)
    before, refused, loaded = peak_mib(), 0, 0
    for number in range(count):
        kind = number % len(KINDS)
        mutant(rng, folder / str(kind), originals[kind])
        try:
            experts = checkpoints.load_experts(folder / str(kind), 0, progress=False)
        except checkpoints.CheckpointError as error:
            refused += 1
            if len(str(error)) > 2000:
                raise AssertionError(f"mutant {number}: a message of {len(str(error))} characters") from error
        else:
            loaded += 1
            if experts.gate_up.payload.shape != shapes[kind]:
                raise AssertionError(f"mutant {number}: shape {experts.gate_up.payload.shape}, expected {shapes[kind]}")
    growth = round(peak_mib() - before, 1)
    print(json.dumps({"mutants": count, "refused": refused, "loaded": loaded, "growth_mib": growth}))


if __name__ == "__main__":
    main()

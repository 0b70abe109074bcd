"""Build an index by reading the tar headers of all shards in parallel. Image data is not read."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.data.index.latent_statistics import LatentStatistics, sum_statistics
from distgan.data.index.members import (
    LatentMembers,
    Passed,
    SampleRule,
    describe_passed,
    is_sample_by_last_dot,
    shown,
    sort_of,
)
from distgan.data.index.table import (
    ARRAYS,
    EXTENSIONS,
    KINDS,
    MAX_CLASSES,
    Index,
    Shard,
    concatenate,
    describe_gaps,
    kind_of,
)
from distgan.data.kinds import text
from distgan.data.kinds.latents import MAX_BYTES
from distgan.data.storage import locations, patterns
from distgan.data.storage.tar import Digest, WindowReader, walk
from distgan.errors import UnreadableSampleError, UserError, counted

_HASH_CHUNK = 16 << 20
ReportProgress = Callable[[int, int], None]
"""Callback: receives the number of finished shards and the total number of shards."""


@dataclass(frozen=True)
class Built:
    """An index, and one note per sort of content in the shards that it leaves out."""

    index: Index
    notes: tuple[str, ...]


def index_shards(
    shards: str | Sequence[str],
    *,
    verify: bool = False,
    strict: bool = False,
    last_dot: bool = False,
    extension: str | None = None,
    progress: ReportProgress | None = None,
    class_names: Sequence[str] | None = None,
    kind: str | None = None,
    latents: LatentMembers | None = None,
    shift: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
) -> Built:
    """Index tars from their headers, labels, text, points and latents; return the index and notes.

    Text characters are numbered by their frequency in these shards.

    Args:
        shards: folder, glob, brace expansion, path or URL of tars, or a list of these.
        verify: read each shard in full and store its SHA-256, so that downloads can be checked against it.
        strict: raise an error for a shard without samples. By default such shards are left out with a note.
        last_dot: start the extension at the last dot of a member's name instead of the first.
        extension: extension of the member that makes a sample, instead of those in `KINDS`, for `data.stages`;
            alternatives are separated by semicolons.
        progress: called after each shard.
        class_names: one name per label.
        kind: kind of samples, a key of `KINDS`; None is the first one that the shards hold.
        latents: what the members named KEY.npy, or those of `extension`, hold: moments or latents of an autoencoder.
            None: those are points, and latents are named KEY.moments.npy or KEY.latent.npy.
        shift, scale: of latents, one number or one per channel; None measures them over these shards, so that each
            channel has mean 0 and standard deviation 1.

    Raises:
        UserError: a shard or member is invalid; the message names it.
    """
    rule = SampleRule.of(extension, last_dot, latents, kind)
    urls = patterns.expand(shards)
    scans: list[_Scan] = []
    with ThreadPoolExecutor(max_workers=32 if locations.is_remote(urls[0]) else 4) as pool:
        try:
            for scan in pool.map(lambda url: _scan(url, verify, rule), urls):
                scans.append(scan)
                if progress is not None:
                    progress(len(scans), len(urls))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    kind = next((kind for kind in KINDS if any(scan.kind == kind for scan in scans)), "")
    used = [scan for scan in scans if scan.kind == kind and kind]
    left_out = [scan for scan in scans if scan not in used]
    for scan in left_out if strict or not used else ():
        raise UserError(f"{scan.name}: {_without_sample(scan, kind, rule)}")
    labeled = [scan for scan in used if scan.arrays["labels"][0] >= 0]
    if labeled and len(labeled) < len(used):
        without = next(scan for scan in used if scan.arrays["labels"][0] < 0)
        raise UserError(
            f"{without.name}: found no .cls labels, but {labeled[0].name} has labels; label all samples or none"
        )
    arrays = concatenate([scan.arrays for scan in used])
    if class_names is not None and labeled and len(class_names) <= int(arrays["labels"].max()):
        raise UserError(
            f"class names: found {len(class_names)} names, expected at least {int(arrays['labels'].max()) + 1} "
            f"because labels go up to {int(arrays['labels'].max())}; name each class"
        )
    vocabulary = None
    if kind == "text":
        vocabulary = text.make_vocabulary(sum((scan.characters for scan in used), Counter()))
    stored, others = None, 0
    if kind == "latents":
        stored, others = sum_statistics(scan.latents for scan in used).stored(shift, scale)
    elif shift is not None or scale is not None:
        raise UserError(f"--shift, --scale: are of latents, but the shards hold {kind}; leave them out")
    left_out_urls = [scan.shard.url for scan in left_out]
    index = Index([scan.shard for scan in used], arrays, class_names, vocabulary, left_out_urls, stored)
    notes = [f"left out: {scan.name}: {_without_sample(scan, kind, rule)}" for scan in left_out]
    torn = [example for scan in used for example in scan.torn]
    if torn:
        notes.append(
            f"the members of {counted(len(torn), 'sample')} (such as {torn[0]}) are not next to each other in the tar; "
            "data.stages gets only the first of them; write the tar sorted by name to use all"
        )
    unreadable = [example for scan in used for example in scan.unreadable]
    if unreadable:
        what = "text samples" if kind == "text" else kind
        notes.append(f"{len(unreadable):,} {what} cannot be read (such as {unreadable[0]}); training replaces them")
    if others and stored is not None:
        notes.append(f"{others:,} latents have another shape than {stored.kind.shape}; training replaces them")
    return Built(index, (*notes, *describe_passed(_merged(used), rule), *describe_gaps(index.labels)))


@dataclass(frozen=True)
class _Scan:
    name: str
    """Shard name as shown in messages."""
    shard: Shard
    kind: str
    """Kind of its samples; empty if it has no samples."""
    arrays: dict[str, NDArray[Any]]
    passed: Passed
    characters: Counter[str] = field(default_factory=Counter)
    """Number of occurrences of each character in a text shard."""
    unreadable: tuple[str, ...] = ()
    """Texts that are not one line of UTF-8 and damaged latents, each with its shard and the reason."""
    torn: tuple[str, ...] = ()
    """Samples whose members are not next to each other, each with its shard."""
    latents: LatentStatistics = field(default_factory=LatentStatistics)


class _Found(NamedTuple):
    """A possible sample: byte offset and size of its data, CRC-32 of its header, index into `EXTENSIONS`."""

    offset: int
    size: int
    crc: int
    extension: int


def _scan(url: str, verify: bool, rule: SampleRule) -> _Scan:
    """Read the headers of one shard and return its contents. Raises UserError."""
    name = locations.public_name(url)
    digest = hashlib.sha256()
    found: dict[str, dict[bytes, _Found]] = {kind: {} for kind in KINDS}
    twice: dict[str, bytes] = {}
    labels: dict[bytes, int] = {}
    spans: dict[bytes, tuple[int, int]] = {}
    torn: dict[bytes, None] = {}
    last = b""
    passed: Passed = {}

    def pass_over(what: str, member: bytes) -> None:
        count, example = passed.get(what, (0, member))
        passed[what] = count + 1, example

    try:
        with WindowReader(url) as reader:
            size = reader.size
            for member in walk(reader, name, digest, pass_over):
                key, extension = rule.split(member.name)
                if key in torn or (key in spans and key != last):
                    torn[key] = None
                elif key:
                    spans[key] = spans.get(key, (member.start, 0))[0], member.end
                last = key or last  # as WebDataset, which passes over members without a key
                if extension == "cls":
                    if key in labels:
                        raise UserError(
                            f"{name}: found two labels for the key {shown(key)!r}, expected one; "
                            "write the shard again with unique keys"
                        )
                    content = reader.read(member.offset, min(member.size, 32))
                    digest.update(content)
                    labels[key] = _parse_label(content, name, member.name)
                elif extension in rule.stored:
                    stored = rule.stored[extension]
                    kind = kind_of(stored)
                    if key in found[kind]:
                        twice.setdefault(kind, key)
                    where = member.offset, member.size, member.crc
                    found[kind][key] = _Found(*where, EXTENSIONS.index(stored))
                else:
                    pass_over(sort_of(member.name, extension), member.name)
            kind = next((kind for kind in KINDS if found[kind]), "")
            # Sort by offset because a hard link shares the data of an earlier member.
            samples = dict(sorted(found.get(kind, {}).items(), key=lambda item: item[1].offset))
            contents = _read_contents(reader, samples, kind, digest, name)
            sha256 = _sha256(reader) if verify else None
    except OSError as error:
        raise UserError(f"{name}: cannot read the shard: {error.strerror or error}") from None
    if kind in twice:
        raise UserError(
            f"{name}: found two {kind} for the key {shown(twice[kind])!r}, expected one; "
            "write the shard again with unique keys, or name the extension of the samples with --extension"
        )
    for other, members in found.items():
        for key, beside in members.items() if other != kind else ():
            extension = EXTENSIONS[beside.extension]
            pass_over(f".{extension}", key + f".{extension}".encode())
    for what, (_, example) in list(passed.items()):
        # Another member of a sample, such as its mask, which --last-dot would make a sample of its own.
        if is_sample_by_last_dot(example, rule) and rule.split(example)[0] in samples:
            passed[f"{what} beside samples"] = passed.pop(what)
    for key in labels.keys() - samples.keys():
        pass_over(".cls labels without a sample", key + b".cls")
    shard = Shard(url, size, len(samples), digest.hexdigest(), sha256)
    if not samples:
        return _Scan(name, shard, kind, {}, passed)
    of_samples = [labels.get(key, -1) for key in samples]
    if min(of_samples) < 0 <= max(of_samples):
        without = next(key for key in samples if key not in labels)
        raise UserError(
            f"{name}: {shown(without)!r} has no .cls label, but other samples have one; label all samples or none"
        )
    offsets, sizes, crcs, extensions = zip(*samples.values(), strict=True)
    starts, ends = np.array([spans[key] for key in samples], np.int64).T
    arrays = {
        "offsets": offsets,
        "sizes": sizes,
        "span_starts": starts,
        "span_sizes": ends - starts,
        "key_ends": np.cumsum([len(key) for key in samples]),
        "labels": of_samples,
        "header_crcs": crcs,
        "extensions": extensions,
        "keys": np.frombuffer(b"".join(samples), np.uint8),
    }
    typed = {array: np.asarray(values, ARRAYS[array]) for array, values in arrays.items()}
    apart = tuple(f"{shown(key)!r} in {name}" for key in torn if key in samples)
    return _Scan(name, shard, kind, typed, passed, *contents[:2], apart, contents[2])


def _merged(scans: Iterable[_Scan]) -> Passed:
    passed: Passed = {}
    for scan in scans:
        for what, (count, example) in scan.passed.items():
            before, first = passed.get(what, (0, example))
            passed[what] = before + count, first
    return passed


def _without_sample(scan: _Scan, kind: str, rule: SampleRule) -> str:
    """Explain why a shard is left out and list its contents."""
    if scan.kind:
        return f"found only {scan.kind}, but other shards hold {kind}; index the shards of each kind separately"
    described = describe_passed(scan.passed, rule)
    said = "; ".join(described) if described else "the tar has no members"
    return f"found no sample, expected members named KEY.{', .'.join(rule.stored)}; {said}"


def _read_contents(
    reader: WindowReader, samples: Mapping[bytes, _Found], kind: str, digest: Digest, shard: str
) -> tuple[Counter[str], tuple[str, ...], LatentStatistics]:
    """Count the characters of a shard's text, list its unreadable samples, and sum up its latents.

    Hash text, points and latents too: their headers do not identify their data.
    """
    characters: Counter[str] = Counter()
    unreadable: list[str] = []
    statistics = LatentStatistics()
    most = MAX_BYTES if kind == "latents" else text.MAX_LINE_BYTES
    for key, sample in samples.items() if kind != "images" else ():
        if sample.size > most:
            raise UserError(
                f"{shard}: sample too large: found {sample.size:,} bytes, expected at most {most:,} "
                "per line of text, point or latent; split or remove the sample"
            )
        content = reader.read(sample.offset, sample.size)
        digest.update(content)
        try:
            if kind == "text":
                characters.update(text.read_line(content))
            elif kind == "latents":
                statistics.add(content, EXTENSIONS[sample.extension])
        except UnreadableSampleError as error:
            unreadable.append(f"{shown(key)!r} in {shard}: {error}")
    return characters, tuple(unreadable), statistics


def _parse_label(content: bytes, shard: str, member: bytes) -> int:
    text = content.strip()
    if not text.isdigit() or len(text) > 9 or int(text) >= MAX_CLASSES:
        found = f"{shard}: invalid label in {shown(member)!r}: found {shown(text)!r}"
        raise UserError(f"{found}, expected a whole number from 0 to {MAX_CLASSES - 1:,}; correct the label")
    return int(text)


def _sha256(reader: WindowReader) -> str:
    digest = hashlib.sha256()
    for start in range(0, reader.size, _HASH_CHUNK):
        digest.update(reader.read(start, _HASH_CHUNK))
    return digest.hexdigest()

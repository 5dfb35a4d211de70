"""What a manifest must mean, beyond its types: names that resolve, numbers that fit, tables that belong to a stage.

`check_manifest` needs the manifest alone; `check_graph` compares one part with the graph file it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from edgekit.bundle.combinations import check_combinations
from edgekit.bundle.feeds import check_feeds
from edgekit.bundle.graphfile import ExternalData, GraphFile, GraphTensor
from edgekit.bundle.manifest import GUARD, MANIFEST_FILE, Manifest, Part, TensorSpec, parse
from edgekit.bundle.recipe import COLUMNS, TABLE_FREE, Recipe, Stage, Table
from edgekit.errors import BadGraph, BadManifest, MissingFile, TableMismatch, UnsafePath, WrongSize

MAX_ELEMENTS = 2**36  # of one tensor: 256 GiB of float32, more than any device this is for
FILE_READERS = {"com.microsoft::EPContext"}  # operators that open a file by a name in their attributes


def decode_manifest(raw: bytes) -> Manifest:
    """Parse `edgekit.json` and check what it means.

    Raises:
        BundleError: of the class that fits, naming the field and the reason.
    """
    manifest = parse(raw)
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself; no file is looked at.

    Raises:
        BadManifest: a name without its thing, a number out of range, a task without its contract.
        MissingFile: a path that `files` does not list.
        WrongSize: a tensor larger than anybody can mean.
        TableMismatch: a table of no stage, of a step count that is not legal, or malformed.
        UnfedInput: an input nothing feeds, or a source nothing gives.
    """
    _check_files(manifest)
    for name, part in manifest.parts.items():
        _check_part(name, part)
    for axis, limits in manifest.axes.items():
        if limits.min > limits.max:
            raise BadManifest(f"axes.{axis}: the smallest size {limits.min} is above the largest, {limits.max}")
    wanted = "decoding" if manifest.task == "text-generation" else "recipe"
    for block, given in (("decoding", manifest.decoding), ("recipe", manifest.recipe)):
        if (given is not None) != (block == wanted):
            raise BadManifest(f"a {manifest.task} bundle has a {wanted} block and no other; `{block}` is the fault")
    if manifest.recipe is not None:
        _check_recipe(manifest.recipe)
    _check_tables(manifest)
    check_feeds(manifest)


def check_graph(name: str, part: Part, graph: GraphFile, sizes: Mapping[str, int]) -> None:
    """Refuse a part whose graph has another signature than declared, or takes bytes from where it must not.

    Args:
        name: of the part, for messages.
        part: what the manifest says.
        graph: what the file says.
        sizes: bytes of every file of the bundle, by path.

    Raises:
        BadManifest: inputs or outputs differ from the graph's.
        UnsafePath: external data outside the graph's folder or the part's `data`.
        WrongSize: external data beyond the end of its file.
        BadGraph: an operator that opens files.
    """
    _check_signature(f"parts.{name}.inputs", part.inputs, graph.inputs)
    _check_signature(f"parts.{name}.outputs", part.outputs, graph.outputs)
    opening = graph.operators & FILE_READERS
    if opening:
        raise BadGraph(f"{part.graph} calls {', '.join(sorted(opening))}, which opens files; a bundle's graph may not")
    for external in graph.external:
        _check_external(name, part, external, sizes)


def _check_files(manifest: Manifest) -> None:
    listed = [file.path for file in manifest.files]
    folded: set[str] = set()
    for path in listed:
        if path == MANIFEST_FILE:
            raise BadManifest(f"files lists {MANIFEST_FILE}, which cannot hold its own hash")
        if path.casefold() in folded:
            raise BadManifest(f"files lists {path} twice (case does not count: some file systems ignore it)")
        folded.add(path.casefold())
    for path in listed:
        for parent in PurePosixPath(path.casefold()).parents:
            if str(parent) in folded:
                raise BadManifest(f"files lists {parent} as a file and as the folder of {path}")
    known = set(listed)
    for where, path in _named_files(manifest):
        if path not in known:
            raise MissingFile(f"{where} names {path}, which `files` does not list. Export the model again.")


def _named_files(manifest: Manifest) -> Iterable[tuple[str, str]]:
    for name, part in manifest.parts.items():
        for path in (part.graph, *part.data):
            yield f"parts.{name}", path
    for name, tokenizer in manifest.tokenizers.items():
        yield f"tokenizers.{name}", tokenizer.file
        if tokenizer.chat_template is not None:
            yield f"tokenizers.{name}", tokenizer.chat_template


def _check_part(name: str, part: Part) -> None:
    folder = PurePosixPath(part.graph).parent
    for path in part.data:
        if PurePosixPath(path).parent != folder:
            raise UnsafePath(f"parts.{name}.data: {path} is not beside {part.graph}; a graph's data lies in its folder")
    if not part.answers:
        raise BadManifest(f"parts.{name} has no outputs, so nothing could use it")
    for kind, specs in (("inputs", part.inputs), ("outputs", part.outputs)):
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise BadManifest(f"parts.{name}.{kind} names a tensor twice")
        for spec in specs:
            _check_elements(f"parts.{name}.{kind}.{spec.name}", (dim for dim in spec.shape if isinstance(dim, int)))
    fed = {spec.name for spec in part.inputs}
    for spec in part.outputs:
        watches = spec.name.removeprefix(GUARD)
        if watches == spec.name:
            continue
        if watches not in fed or spec.dtype != "float32" or spec.shape not in ((), (1,)):
            raise BadManifest(
                f"parts.{name}.outputs: {spec.name} is {spec.dtype} {spec.shape}; a guard is one float32 number, "
                f"called {GUARD}<input> after one of {', '.join(sorted(fed)) or 'no inputs'}"
            )


def _check_elements(where: str, dims: Iterable[int]) -> None:
    elements = 1
    for dim in dims:
        elements *= dim
        if elements > MAX_ELEMENTS:
            raise WrongSize(f"{where} declares more than {MAX_ELEMENTS:,} elements; nobody can mean that")


def _check_recipe(recipe: Recipe) -> None:
    if not recipe.stages:
        raise BadManifest("recipe.stages is empty, so nothing would be drawn")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) != len(names):
        raise BadManifest("recipe.stages names a stage twice")
    for stage in recipe.stages:
        init = stage.init
        sides = (init.channels, init.height // init.downscale, init.width // init.downscale)
        _check_elements(f"recipe.stages.{stage.name}.init", sides)
        _check_elements(f"recipe.stages.{stage.name}.init", (side for side in init.shape if isinstance(side, int)))
    check_combinations(recipe)


def _check_tables(manifest: Manifest) -> None:
    stages = {stage.name: stage for stage in manifest.recipe.stages} if manifest.recipe is not None else {}
    seen: set[tuple[str, int]] = set()
    for table in manifest.tables:
        where = f"the table of stage {table.stage!r} with {table.steps} steps"
        if table.stage not in stages:
            raise TableMismatch(f"{where}: the recipe has no such stage ({', '.join(stages) or 'it has none'})")
        _check_table_of(where, table, stages[table.stage])
        if (table.stage, table.steps) in seen:
            raise TableMismatch(f"{where} is there twice")
        seen.add((table.stage, table.steps))
        _check_rows(where, table)


def _check_table_of(where: str, table: Table, stage: Stage) -> None:
    sampler = stage.sampler
    if sampler.kind in TABLE_FREE:
        raise TableMismatch(f"{where}: sampler {sampler.kind!r} runs without one; leave it out")
    if table.steps not in sampler.legal_steps:
        raise TableMismatch(f"{where}: the recipe's legal step counts are {', '.join(map(str, sampler.legal_steps))}")
    if table.nets != sampler.nets or (table.nets and len(table.nets) != len(table.rows)):
        raise TableMismatch(
            f"{where}: its {len(table.rows)} rows run {', '.join(table.nets) or 'one part'}, the recipe's "
            f"{', '.join(sampler.nets) or 'one part'}"
        )


def _check_rows(where: str, table: Table) -> None:
    if not table.rows:
        raise TableMismatch(f"{where} has no rows")
    for number, row in enumerate(table.rows):
        if len(row) != len(COLUMNS) or not all(map(math.isfinite, row)):
            raise TableMismatch(f"{where}: row {number} is not {len(COLUMNS)} finite numbers ({', '.join(COLUMNS)})")
    if not (math.isfinite(table.init_scale) and math.isfinite(table.init_keep)):
        raise TableMismatch(f"{where}: init_scale is {table.init_scale}, init_keep {table.init_keep}")


def _check_signature(where: str, declared: tuple[TensorSpec, ...], actual: tuple[GraphTensor, ...]) -> None:
    said, are = [spec.name for spec in declared], [tensor.name for tensor in actual]
    if said != are:
        raise BadManifest(f"{where} are {', '.join(said) or 'none'}; the graph's are {', '.join(are) or 'none'}")
    for spec, tensor in zip(declared, actual, strict=True):
        if spec.dtype != tensor.dtype or not _same_shape(spec, tensor):
            shape = "any" if tensor.shape is None else tuple("?" if dim is None else dim for dim in tensor.shape)
            raise BadManifest(
                f"{where}.{spec.name} is {spec.dtype} {spec.shape}; in the graph it is {tensor.dtype} {shape}"
            )


def _same_shape(spec: TensorSpec, tensor: GraphTensor) -> bool:
    """Fixed sizes agree and dynamic axes are dynamic on both sides; what an axis is called is the manifest's affair."""
    if tensor.shape is None:
        return True
    if len(spec.shape) != len(tensor.shape):
        return False
    pairs = zip(spec.shape, tensor.shape, strict=True)
    return all(said == is_ if isinstance(said, int) else not isinstance(is_, int) for said, is_ in pairs)


def _check_external(name: str, part: Part, external: ExternalData, sizes: Mapping[str, int]) -> None:
    where = f"{part.graph}: tensor {external.tensor!r}"
    path = str(PurePosixPath(part.graph).with_name(external.location)) if _is_plain(external.location) else None
    if path is None or path not in part.data:
        raise UnsafePath(
            f"{where} takes its bytes from {external.location!r}, which parts.{name}.data does not list; "
            f"a graph reads from its own bundle only"
        )
    end = external.offset + (external.length or 0)
    if end > sizes.get(path, 0):
        raise WrongSize(f"{where} ends at byte {end:,} of {path}, which has {sizes.get(path, 0):,}")


def _is_plain(location: str) -> bool:
    """A file name with nothing that any system could read as a folder, drive or address."""
    return location not in ("", ".", "..") and not set(location) & set("/\\:*\0")

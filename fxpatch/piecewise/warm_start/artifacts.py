"""Warm start: a model that was prepared once is prepared again, in another process, without Dynamo and the compiler.

What is saved is the recipe (`recipe`: pieces, and what goes in and out), what the trace depended on (`witness`), and
the files that Inductor makes for each distinct piece, compiled right into the entry. One entry per key (`request`);
`cache_files` says when files are trusted. Loading goes from the cheap to the dangerous: permissions; the record's own
sum; its key; then whether code and values are those of the trace; then the sums of Inductor's files; and only then are
these loaded, which runs what is in them (they hold pickles and machine code). Whatever is wrong on the way is reported,
with a warning, and the model is prepared as if nothing had been there; what is loaded is used whole or not at all.

Not saved, and said so in the report: models with native fallbacks (they are tried in every process), compilers other
than `"inductor"` and `"eager"`, tensors that have no name in the model, and what `graph_json` cannot write.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fxpatch.errors import FxPatchWarning
from fxpatch.piecewise.regions import classes_of, marked
from fxpatch.piecewise.snapshot import Snapshot
from fxpatch.piecewise.split import Split
from fxpatch.piecewise.trace import Traced
from fxpatch.piecewise.warm_start import cache_files, recipe, witness
from fxpatch.piecewise.warm_start.cache_files import DistrustedError
from fxpatch.piecewise.warm_start.graph_json import Json, NotCacheableError
from fxpatch.piecewise.warm_start.recipe import Forms
from fxpatch.piecewise.warm_start.request import Request, key_of, key_parts


class Warm:
    """What was loaded.

    Attributes:
        traced, split: the model.
        forms: what its pieces were compiled to.
        written: leaves of the call that the model writes to.
    """

    def __init__(self, traced: Traced, split: Split, forms: Forms, written: set[int]) -> None:
        self.traced, self.split, self.forms, self.written = traced, split, forms, written


class Artifacts:
    """One request's entry in a cache.

    Args:
        directory: of the cache; made where there is none. Others must not be able to write to it.
        request: what is to be prepared.

    Attributes:
        notes: what became of it, for the report.
    """

    def __init__(self, directory: str | os.PathLike[str], request: Request) -> None:
        self.request, self.notes = request, list[str]()
        self.watch = witness.Watch()
        self.key, self._cache, self._entry = "", Path(directory), Path()
        self._usable, self._parts = True, dict[str, Any]()
        try:
            self._parts = key_parts(request)
            self.key = key_of(self._parts)
            self._cache = cache_files.trusted_directory(Path(directory).expanduser())
        except NotCacheableError as error:
            self._not_cacheable(error)
        except DistrustedError as error:
            self._usable = False
            self._report(f"the cache {directory} is not used: {error}")
        except Exception as error:  # of any class: a device module or pass of whatever vendor is asked
            self._usable = False
            self._report(f"the cache is not used: no key can be made: {type(error).__name__}: {error}")

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(self, written: Snapshot) -> Warm | None:
        """What an earlier preparation left; None where there is nothing that can be used.

        Args:
            written: is told of the bound tensors, and that those are written that the model writes to.
        """
        if not self._usable:
            return None
        try:
            record = cache_files.read_record(self._cache / f"{self.key}.json")
            if record is None:
                return None
            warm = self._load(record, written)
        except DistrustedError as error:
            self._report(f"what is saved is not used: {error}")
            return None
        except Exception as error:  # of any class: torch's loader has many, and none may stop a model that works
            self._report(f"what is saved cannot be loaded: {type(error).__name__}: {str(error)[:300]}")
            return None
        self.notes.append(f"loaded from {self._cache / self.key}: not traced, not compiled")
        return warm

    def _load(self, record: Mapping[str, Any], written: Snapshot) -> Warm:
        model, begun = self.request.options.model, self.request.start
        if record.get("key") != self.key:
            raise DistrustedError(f"{self.key}.json is of another key, {record.get('key')!r}")
        with self._as_traced(record["regions"]):
            changed = witness.difference(record["witness"], model, begun.args, begun.kwargs)
        if changed is not None:
            raise DistrustedError(f"it is stale: {changed}")
        entry = self._cache / os.path.basename(record["entry"])
        if not entry.name.startswith(f"{self.key}."):
            raise DistrustedError(f"{self.key}.json names {entry.name}, which is no entry of it")
        wrong = cache_files.difference(entry, record["files"])
        if wrong is not None:
            raise DistrustedError(f"{entry.name} is damaged: {wrong}")
        with _known_instructions(record["instructions"]):
            loaded = {key: _inductor_load(entry / os.path.basename(name)) for key, name in record["artifacts"].items()}
        traced, split, forms = recipe.read(record["recipe"], model, begun.arguments, loaded.__getitem__)
        named = recipe.tensors_of(model)
        written.add(traced.bound)
        leaves = [begun.leaves[leaf] for leaf in record["written leaves"]]
        for tensor in (*leaves, *(named[name] for name in record["written tensors"])):
            torch.autograd.graph.increment_version(tensor)  # as a trace would have: it runs the model
        return Warm(traced, split, forms, set(record["written leaves"]))

    # -- saving ------------------------------------------------------------------------------------------------------

    @contextmanager
    def compiling(self) -> Iterator[Callable[[str], AbstractContextManager[object]]]:
        """Gives a context per compiled form: what is compiled in it leaves its files in the entry."""
        if not self._usable:
            yield lambda key: nullcontext()
            return
        try:
            self._entry = cache_files.new_directory(self._cache, self.key)
        except OSError as error:
            self._usable = False
            self._report(f"the model is not saved: {type(error).__name__}: {error}")
            yield lambda key: nullcontext()
            return
        try:
            if self.request.start.compiler != "inductor":
                yield lambda key: nullcontext()
                return
            from torch._inductor.cpu_vec_isa import pick_vec_isa
            from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

            pick_vec_isa()  # it compiles and keeps what it finds: not within every directory
            yield lambda key: temporary_cache_dir(str(self._entry / key))
        except BaseException:
            shutil.rmtree(self._entry, ignore_errors=True)
            raise

    def save(self, traced: Traced, split: Split, forms: Forms, snapshot: Snapshot, leaves: set[int]) -> None:
        """Saves what has been prepared.

        Args:
            snapshot: knows what the trace has written to.
            leaves: of the call, that the model writes to.
        """
        if not self._usable:
            return
        model, begun = self.request.options.model, self.request.start
        found = {id(tensor) for tensor in snapshot.written()}
        try:
            compiled = begun.compiler == "inductor"
            with self._as_traced(traced.regions):
                depended = witness.written(self.watch, model, begun.args, begun.kwargs)
            keys = {each.key for built in forms.values() for each in built if each.key} if compiled else set()
            record = {
                "key": self.key,
                "request": self._parts,
                "witness": depended,
                "regions": traced.regions,
                "recipe": recipe.written(traced, split, forms, compiled=compiled),
                "artifacts": {key: key for key in sorted(keys)},
                "written leaves": sorted(leaves),
                "written tensors": sorted(name for name, tensor in traced.names.items() if id(tensor) in found),
                "instructions": _instructions() if compiled else None,
                "entry": self._entry.name,
            }
            for key in keys:
                _check_saved(self._entry / key)
                shutil.rmtree(self._entry / key / "locks", ignore_errors=True)
            record["files"] = cache_files.seal(self._entry)
            cache_files.write_record(self._cache / f"{self.key}.json", record)
            cache_files.forget_old(self._cache, self.key, self._entry.name)
        except NotCacheableError as error:
            self._not_cacheable(error)
        except Exception as error:  # of any class: what is compared is the user's; the model works as it is
            self._report(f"the model is not saved: {type(error).__name__}: {error}")
        else:
            self.notes.append(f"saved to {self._cache / self.key}")
            return
        shutil.rmtree(self._entry, ignore_errors=True)  # no record names it

    def refuse(self) -> None:
        """What was loaded is not used after all."""
        self.notes[-1] = "what is saved is not used: another rank has to trace"

    def _as_traced(self, regions: bool) -> AbstractContextManager[None]:
        """The model as tracing found it: what a trace depended on is named by where it was then."""
        return marked(classes_of(self.request.options.model)) if regions else nullcontext()

    def _not_cacheable(self, error: NotCacheableError) -> None:
        self._usable = False
        self.notes.append(f"not saved for a warm start: {error}")

    def _report(self, words: str) -> None:
        self.notes.append(words)
        warnings.warn(words, FxPatchWarning, stacklevel=2)


def _check_saved(directory: Path) -> None:
    """Inductor leaves no entry where a graph or a pass cannot be keyed."""
    try:
        entries = os.listdir(directory / "aotautograd")
    except FileNotFoundError:
        entries = []
    if len(entries) != 1:
        raise NotCacheableError(f"Inductor saved {len(entries)} forms of a piece, and has to save 1")


def _inductor_load(directory: Path) -> Callable[..., Any]:
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(directory), format="unpacked")


def _instructions() -> Json:
    """The sets of instructions that Inductor has found to work here, by trying each in a process of its own."""
    from torch._inductor import cpu_vec_isa

    return [str(each) for each in cpu_vec_isa.valid_vec_isa_list()]


@contextmanager
def _known_instructions(found: Json) -> Iterator[None]:
    """Inductor takes what was found before and tries nothing, and compiles no headers for what it need not compile:
    either takes seconds. The processor is part of the key."""
    if found is None:
        yield
        return
    from torch._inductor import codecache, cpu_vec_isa

    known = {str(each): each for each in cpu_vec_isa.supported_vec_isa_list}
    # not by its setting, which is part of the name of each file
    asked, precompile = cpu_vec_isa.valid_vec_isa_list, codecache._precompile_header
    codecache._precompile_header = lambda *args, **kwargs: ""  # type: ignore[assignment]
    if all(each in known for each in found):
        cpu_vec_isa.valid_vec_isa_list = lambda: [known[each] for each in found]  # type: ignore[assignment]
    try:
        cpu_vec_isa.pick_vec_isa()  # and if it tries all the same: not among the files of an entry
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list, codecache._precompile_header = asked, precompile

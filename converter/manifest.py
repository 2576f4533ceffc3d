"""The manifest: models times targets, read from YAML into typed values, or every problem at once with its place.

load() puts the checks of manifest_fields.py (each field by itself) and manifest_rules.py (fields against each other) on
lines of the file, follows paths, and expands models times targets into jobs. Validating the whole file as one pydantic
model would be shorter, but one wrong field would hide every problem between fields behind it.
"""

from __future__ import annotations

import hashlib
import os.path
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from converter.manifest_fields import (
    Calibration,
    Evaluation,
    Exclude,
    Job,
    Manifest,
    Model,
    Publish,
    Rule,
    Selection,
    Sign,
    Target,
    json_schema,
    read_part,
)
from converter.manifest_form import Form, plain
from converter.manifest_rules import check_name, check_publish, check_repo, check_target
from converter.marks import (
    Entry,
    Fields,
    Mark,
    Node,
    Problems,
    Text,
    parse,
    quoted,
    read_bytes,
    suggestion,
)

__all__ = [
    "Calibration",
    "Evaluation",
    "Exclude",
    "Job",
    "Manifest",
    "Model",
    "Publish",
    "Rule",
    "Selection",
    "Target",
    "json_schema",
    "load",
]


def load(path: Path) -> Manifest:
    """Give the manifest in the file at `path`, its paths absolute and its jobs expanded.

    Raises ManifestError with every problem found, each as file:line:column: what. How to mend it.
    """
    problems = Problems(path)
    data = read_bytes(path, problems)
    manifest = _Reader(path, parse(data, problems), Form(problems)).manifest(hashlib.sha256(data).hexdigest())
    problems.raise_if_any()
    assert manifest is not None, "what keeps a manifest from being built is a problem"
    return manifest


FIND = "Write a path relative to the manifest, or an absolute one"
Corpus = TypeVar("Corpus", Calibration, Evaluation)


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A model being read: where it is in the file, what messages call it, and whether the file gives its name."""

    model: Model
    fields: Fields
    label: str
    named: bool


class _Reader:
    """One pass over one file; problems are gathered on the way."""

    def __init__(self, path: Path, root: Fields, form: Form) -> None:
        self.path = path
        self.folder = Path(os.path.abspath(path.parent))
        self.root = root
        self.form = form
        self.say = form.say
        self.targets: Mapping[str, Entry] = {}

    def manifest(self, sha256: str) -> Manifest | None:
        self.targets = self.form.named_parts(self.root, "targets", "")
        targets = {name: self.target(name, entry) for name, entry in self.targets.items()}
        self.check_case()
        drafts = self.distinct(self.models())
        jobs = [job for draft in drafts for job in self.jobs_of(draft)]
        excludes = tuple(self.excludes(drafts))
        kept = tuple(job for job in jobs if not any(exclude.covers(job) for _, exclude in excludes))
        ready = {
            "models": tuple(draft.model for draft in drafts),
            "targets": {name: target for name, target in targets.items() if target},
            "calibration": self.text_section(Calibration()),
            "evaluation": self.text_section(Evaluation()),
            "publish": self.publish(),
            "exclude": tuple(exclude for _, exclude in excludes),
        }
        present = {key: value for key, value in ready.items() if key in self.root.entries}
        texts = {key: self.root.entries[key] for key in ("calibration", "evaluation") if key in self.root.entries}
        places = {key: f"{self.path}:{entry.key.line}" for key, entry in texts.items()}
        facts = {"path": self.path, "sha256": sha256, "expanded": kept, "places": places}
        built = self.form.part(Manifest, self.root, "", present | facts)
        if not self.form.problems.found:  # with jobs missing, what follows would blame the wrong place
            self.check_effects(drafts, jobs, excludes, kept)
        if built:
            self.check_held_out(built)
            self.check_repos(built)
        return built

    # Targets.

    def target(self, name: str, entry: Entry) -> Target | None:
        """Read one target, also by the rules between its fields; None when any of it is wrong."""
        assert isinstance(entry.value, Fields), "named_parts gives nothing else"
        label = f"target {quoted(name)}"
        before = len(self.form.problems.found)
        if problem := check_name(name):
            self.say(entry.key, "", f"target {problem[0]}", problem[1])
        where = {"name": name, "where": f"{self.path}:{entry.key.line}"}
        values = self.form.values(Target, entry.value, label)
        built, findings = read_part(Target, values | where)
        wrong = {finding.at[0] for finding in findings if finding.at}
        for finding in check_target(built) if built else ():
            if not wrong.intersection(finding.needs + finding.at[:1]):
                findings.append(finding)
        for finding in findings:
            mark = entry.value.locate(finding.at) if finding.at else entry.key
            self.say(mark, label, finding.what, finding.remedy)
        if built and built.imatrix_file:
            built = self.with_imatrix(built, entry.value, label)
        return built if len(self.form.problems.found) == before and not findings else None

    def with_imatrix(self, target: Target, fields: Fields, label: str) -> Target:
        """Give the target with the path of its imatrix file absolute; the file must be there."""
        assert target.imatrix_file, "the caller has looked"
        file = self.absolute(target.imatrix_file)
        if not _holds(file, Path.is_file):
            self.say(fields.locate(("imatrix",)), label, f"there is no file {quoted(str(file))}", FIND)
        return target.model_copy(update={"imatrix": str(file)})

    def check_case(self) -> None:
        """Find targets whose folders would be one on a file system that does not tell case apart."""
        seen: dict[str, str] = {}
        for name, entry in self.targets.items():
            if first := seen.get(name.casefold()):
                what = f"target {quoted(name)} differs from {quoted(first)} only in case"
                self.say(entry.key, "", what, "Choose another name")
            seen.setdefault(name.casefold(), name)

    def target_names(self, items: tuple[Node, ...], label: str) -> tuple[str, ...]:
        names: list[str] = []
        for item in items:
            if not isinstance(item, Text):
                self.say(item.mark, label, "the name of a target is wanted here", "Define targets under targets:")
            elif item.text not in self.targets:
                self.say(
                    item.mark, label, f"there is no target {quoted(item.text)}", suggestion(item.text, self.targets)
                )
            elif item.text in names:
                self.say(item.mark, label, f"target {quoted(item.text)} is listed twice", "Remove one of the two")
            else:
                names.append(item.text)
        return tuple(names)

    # Models.

    def models(self) -> Iterator[_Draft]:
        for index, item in enumerate(self.form.items(self.root, "models", "")):
            label = f"model {index + 1}"
            fields = self.form.fields(item, label, "models")
            if fields is None:
                continue
            ready: dict[str, object] = {}
            if "targets" in fields.entries:
                ready["targets"] = self.selection(fields, label)
            if "overrides" in fields.entries:
                overrides = self.form.named_parts(fields, "overrides", label)
                ready["overrides"] = {name: plain(entry.value) for name, entry in overrides.items()}
            model = self.form.part(Model, fields, label, ready)
            if model:
                model = self.located(model, fields, label)
                yield _Draft(model=model, fields=fields, label=label, named="name" in fields.entries)

    def selection(self, fields: Fields, label: str) -> tuple[str, ...] | Selection:
        node = fields.entries["targets"].value
        if not isinstance(node, Fields):
            return self.target_names(self.form.items(fields, "targets", label), label)
        self.form.values(Selection, node, label)
        added = {name: self.target(name, entry) for name, entry in self.form.named_parts(node, "add", label).items()}
        for name in added:
            if name in self.targets:
                what = f"target {quoted(name)} is defined under targets: as well"
                self.say(node.locate(("add", name)), label, what, "Use overrides:, or give it another name")
        return Selection(
            add={name: target for name, target in added.items() if target},
            remove=self.target_names(self.form.items(node, "remove", label), label),
        )

    def located(self, model: Model, fields: Fields, label: str) -> Model:
        """Give the model with an absolute folder and a name, which may not be unique yet."""
        if model.folder is None:
            last = model.source.removeprefix("hub:").partition("@")[0].rpartition("/")[2]
            return model.model_copy(update={"name": model.name or last})
        folder = self.absolute(model.folder)
        if not _holds(folder, Path.is_dir):
            what, remedy = f"there is no folder {quoted(str(folder))}", FIND
            if _holds(folder, Path.is_file):
                what, remedy = f"{quoted(str(folder))} is a file", "Name the folder that it lies in"
            self.say(fields.locate(("source",)), label, what, remedy)
        return model.model_copy(update={"source": f"folder:{folder}", "name": model.name or folder.name})

    def distinct(self, drafts: Iterator[_Draft]) -> list[_Draft]:
        """Put the owner in front where the last parts of sources are equal; names still equal are problems."""
        listed = list(drafts)
        count = Counter(draft.model.name.casefold() for draft in listed)
        renamed: list[_Draft] = []
        seen: dict[str, str] = {}
        for draft in listed:
            model = draft.model
            if not draft.named and count[model.name.casefold()] > 1:
                model = model.model_copy(update={"name": f"{model.owner}-{model.name}"})
            mark = draft.fields.locate(("name",) if draft.named else ("source",))
            if problem := check_name(model.name):
                self.say(mark, draft.label, problem[0], f"{problem[1]}; add name: to set it")
            elif first := seen.get(model.name.casefold()):
                self.say(
                    mark, draft.label, f"{quoted(model.name)} is also the name of {first}", "Add name: to one of them"
                )
            seen.setdefault(model.name.casefold(), draft.label)
            renamed.append(replace(draft, model=model))
        return renamed

    # Jobs.

    def jobs_of(self, draft: _Draft) -> Iterator[Job]:
        """Give the jobs of one model; each target with overrides is checked anew as a whole."""
        selection = draft.model.targets
        chosen = dict(self.targets)
        if isinstance(selection, tuple):
            chosen = {name: entry for name, entry in self.targets.items() if name in selection}
        elif selection is not None:
            changes = draft.fields.entries["targets"].value
            assert isinstance(changes, Fields)
            chosen = {name: entry for name, entry in chosen.items() if name not in selection.remove}
            added = changes.entries["add"].value if selection.add else None
            if isinstance(added, Fields):
                chosen |= {name: added.entries[name] for name in selection.add}
        overrides = draft.fields.entries["overrides"].value if draft.model.overrides else None
        for name, entry in overrides.entries.items() if isinstance(overrides, Fields) else ():
            if name in chosen and isinstance(entry.value, Fields):
                chosen[name] = self.overridden(chosen[name], entry.value, draft.label)
            elif name not in chosen:
                what = f"overrides name {quoted(name)}, which is no target of this model"
                self.say(entry.key, draft.label, what, suggestion(name, chosen) if chosen else "Remove it")
        for name, entry in chosen.items():
            target = self.target(name, entry)
            if target:
                yield Job(model=draft.model, target=target)

    def overridden(self, base: Entry, over: Fields, label: str) -> Entry:
        """Give the target with fields replaced, rules merged, and fields that are null removed."""
        assert isinstance(base.value, Fields), "named_parts gives nothing else"
        entries = dict(base.value.entries)
        for key, entry in over.entries.items():
            below, above = entries.get(key), entry.value
            if key == "format":
                self.say(
                    entry.key, label, "overrides cannot change the format", "Add a target, and choose it with targets:"
                )
            elif isinstance(above, Text) and above.is_null:
                entries.pop(key, None)
            elif key == "rules" and isinstance(above, Fields) and below and isinstance(below.value, Fields):
                kept = {name: rule for name, rule in below.value.entries.items() if name not in above.entries}
                entries[key] = replace(entry, value=replace(above, entries={**above.entries, **kept}))
            else:
                entries[key] = entry
        return replace(base, value=replace(base.value, entries=entries))

    def excludes(self, drafts: list[_Draft]) -> Iterator[tuple[Mark, Exclude]]:
        models = tuple(draft.model.name for draft in drafts)
        added = {
            name for draft in drafts if isinstance(draft.model.targets, Selection) for name in draft.model.targets.add
        }
        names = {"model": models, "target": (*self.targets, *sorted(added))}
        for index, item in enumerate(self.form.items(self.root, "exclude", "")):
            label = f"exclude {index + 1}"
            fields = self.form.fields(item, label, "exclude")
            exclude = self.form.part(Exclude, fields, label, {}) if fields else None
            if fields is None or exclude is None:
                continue
            if exclude.model is None and exclude.target is None:
                self.say(fields.mark, label, "neither a model nor a target is named", "Write model:, target: or both")
            for key, name in (("model", exclude.model), ("target", exclude.target)):
                if name is not None and names[key] and name not in names[key]:
                    remedy = suggestion(name, names[key])
                    self.say(fields.locate((key,)), label, f"there is no {key} {quoted(name)}", remedy)
            yield fields.mark, exclude

    def check_effects(
        self, drafts: list[_Draft], jobs: list[Job], excludes: tuple[tuple[Mark, Exclude], ...], kept: tuple[Job, ...]
    ) -> None:
        """Find what has no effect: an exclude that leaves nothing out, a model without a job."""
        for index, (mark, exclude) in enumerate(excludes):
            if not any(exclude.covers(job) for job in jobs):
                self.say(mark, f"exclude {index + 1}", "no job fits, so nothing is left out", "Remove it")
        for draft in drafts:
            if not any(job.model.name == draft.model.name for job in kept):
                what, remedy = "no target is left for this model", "Remove the model, or what takes its targets away"
                self.say(draft.fields.mark, draft.label, what, remedy)

    # Texts and hubs.

    def text_section(self, default: Corpus) -> Corpus:
        """Read calibration or evaluation, its file's path made absolute."""
        key = type(default).__name__.lower()
        entry = self.root.entries.get(key)
        fields = self.form.fields(entry.value, key, key) if entry else None
        section = self.form.part(type(default), fields, key, {}) if fields else None
        if fields is None or section is None:
            return default
        if isinstance(section, Calibration) and section.keep:
            folder = self.absolute(Path(section.keep.removeprefix("folder:")))
            section = section.model_copy(update={"keep": f"folder:{folder}"})
        kind, _, rest = section.text.partition(":")
        if kind != "file":
            return section
        file = self.absolute(Path(rest))
        if not _holds(file, Path.is_file):
            what, remedy = (
                f"there is no file {quoted(str(file))}",
                FIND,
            )
            self.say(fields.locate(("text",)), key, what, remedy)
        return section.model_copy(update={"text": f"file:{file}"})

    def publish(self) -> Publish | None:
        entry = self.root.entries.get("publish")
        fields = self.form.fields(entry.value, "publish", "publish") if entry else None
        ready = {"sign": self.sign(fields)} if fields and "sign" in fields.entries else {}
        publish = self.form.part(Publish, fields, "publish", ready) if fields else None
        if fields is None or publish is None:
            return None
        for finding in check_publish(publish):
            self.say(fields.locate(finding.at), "publish", finding.what, finding.remedy)
        kind, _, rest = publish.hub.partition(":")
        if kind != "folder":
            return publish
        return publish.model_copy(update={"hub": f"folder:{self.absolute(Path(rest))}"})

    def sign(self, publish: Fields) -> Sign | None:
        """Read how to sign, the key's path made absolute; its file must be there."""
        fields = self.form.fields(publish.entries["sign"].value, "publish", "sign")
        sign = self.form.part(Sign, fields, "publish sign", {}) if fields else None
        if fields is None or sign is None:
            return None
        key = self.absolute(Path(sign.key))
        if not _holds(key, Path.is_file):
            self.say(fields.locate(("key",)), "publish sign", f"there is no file {quoted(str(key))}", FIND)
        return sign.model_copy(update={"key": str(key)})

    def check_held_out(self, manifest: Manifest) -> None:
        text = manifest.evaluation.text
        if text == manifest.calibration.text and text != "builtin":  # the built-in text has two parts that never mix
            mark = self.root.locate(("evaluation", "text"))
            what = f"text {quoted(text)} is what calibration uses, so nothing would be held out"
            self.say(mark, "evaluation", what, "Name another text, column or revision")

    def check_repos(self, manifest: Manifest) -> None:
        """Find repository names that are not allowed once filled in, that two jobs would share, or that are sources."""
        if manifest.publish is None:
            return
        mark = self.root.locate(("publish", "repo"))
        sources = {
            model.source.removeprefix("hub:").partition("@")[0].casefold(): model.source
            for model in manifest.models
            if model.folder is None and manifest.publish.hub == "hf"
        }
        going: dict[tuple[str, str], list[str]] = {}
        for job in manifest.jobs():
            repo = manifest.publish.repo_of(manifest.name, job)
            branch = manifest.publish.branch_of(manifest.name, job)
            if problem := check_repo(repo):
                self.say(mark, "publish", *problem)
            if (source := sources.get(repo.casefold())) and not branch:
                what = f"{job.key} would take the place of its source {quoted(source)}"
                self.say(mark, "publish", what, "Put {target} into repo, or choose a branch")
            going.setdefault((repo.casefold(), branch.casefold()), []).append(job.key)
        for (repo, branch), keys in going.items():
            if len(keys) > 1:
                place = f"branch {quoted(branch)} of {quoted(repo)}" if branch else quoted(repo)
                what = f"{len(keys)} jobs would go to {place}: {', '.join(keys)}"
                self.say(mark, "publish", what, "Put both {model} and {target} into repo")

    def absolute(self, path: Path) -> Path:
        """Give a path relative to the manifest's folder as an absolute one; symbolic links keep their names."""
        return Path(os.path.abspath(self.folder / path))


def _holds(path: Path, test: Callable[[Path], bool]) -> bool:
    try:
        return test(path)
    except OSError:  # a name too long for the file system, a folder that may not be entered
        return False

"""Manifests of Kubernetes with the mesh put in: every document that makes pods, and nothing else is touched.

Strategy: the text is split at its document separators, and only a document that changes is written anew (with its comments and its order); all others
come out byte for byte. Options are found in this order: the pod's annotations, the command line, the pod itself. All problems are told
together, with line and field. What was put in is written down in an annotation, so a second time changes nothing.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.emitter import RoundTripEmitter
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from gateway.errors import ConfigError, Problem
from gateway.mesh.inject_app import found_in, probes_moved
from gateway.mesh.inject_pod import INTERCEPT, JOIN, SIDECAR, STATE, Options, intercept, pause, sidecar, volumes
from gateway.mesh.inject_read import PREFIX, Place
from gateway.mesh.inject_shape import POD, misshapen

DONE = PREFIX + "injected"
MOST = 32 << 20  # bytes of all manifests
TEMPLATES = {
    "Deployment": ("apps/", ("spec", "template")), "StatefulSet": ("apps/", ("spec", "template")), "DaemonSet": ("apps/", ("spec", "template")),
    "ReplicaSet": ("apps/", ("spec", "template")), "ReplicationController": ("v1", ("spec", "template")), "Job": ("batch/", ("spec", "template")),
    "CronJob": ("batch/", ("spec", "jobTemplate", "spec", "template")), "Pod": ("v1", ()),
}  # fmt: skip
ONCE = ("Job", "CronJob")  # nobody calls them for long, and they end by themselves
_SEPARATOR = re.compile(r"^---(?=\s|$)[^\n]*\n?", re.MULTILINE)


class _Emitter(RoundTripEmitter):
    """Writes `[{a: b}]` as it was, not as `[a: b]`."""

    def expect_flow_mapping(self, single: Any = False, force_flow_indent: Any = False) -> None:
        super().expect_flow_mapping(single=False, force_flow_indent=force_flow_indent)


@dataclass
class Injection:
    """The manifests of one stream, and what was noticed."""

    file: str
    given: dict[str, Any]  # of the command line, by the annotation's name
    problems: list[Problem] = field(default_factory=list)
    changed: int = 0
    workloads: int = 0

    def report(self, place: Place, message: str, hint: str = "", *, warning: bool = False) -> None:
        text = f"{place.said}: {message}" if place.said else message
        found = Problem(self.file, place.line, place.column, text, hint, severity="warning" if warning else "error")
        if found not in self.problems:
            self.problems.append(found)

    def run(self, text: str) -> str:
        """Return the manifests with the mesh in them. Raises ConfigError with every error; warnings stay in `problems`."""
        made = "".join(self._document(part, line) if not separator else part for part, line, separator in _split(text))
        errors = [each for each in self.problems if each.severity == "error"]
        if errors:
            raise ConfigError(sorted(self.problems, key=lambda each: (each.line, each.column)))
        return made

    def _document(self, text: str, line: int) -> str:
        writer = YAML()
        writer.preserve_quotes, writer.width, writer.Emitter = True, 1 << 16, _Emitter
        indented = re.search(r"^( *)[^\s#-][^\n]*:[ ]*(?:#[^\n]*)?\n(?: *#[^\n]*\n| *\n)*( *)- ", text, re.MULTILINE)
        if indented and len(indented[2]) > len(indented[1]):
            writer.indent(mapping=2, sequence=4, offset=2)
        try:
            data = writer.load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place((mark.line if mark else 0) + line, (mark.column if mark else 0) + 1, "")
            self.report(place, f"not YAML: {error.problem or error.context}")
            return text
        except (YAMLError, ValueError) as error:
            self.report(Place(line, 1, ""), f"not YAML: {str(error).splitlines()[0]}")
            return text
        before = self.changed
        for workload, at in _workloads(data, Place(line, 1, "", line - 1)):
            self._workload(workload, at)
        if self.changed == before:
            return text
        out = io.StringIO()
        writer.dump(data, out)
        return out.getvalue()

    def _workload(self, data: CommentedMap, at: Place) -> None:
        kind = data.get("kind")
        metadata = data.get("metadata")
        name = metadata.get("name") or metadata.get("generateName") if isinstance(metadata, CommentedMap) else None
        template, place = data, replace(at, document=f"{kind} {name}" if isinstance(name, str) else str(kind))
        for key in TEMPLATES[kind][1]:
            place = place.of(template, key)
            template = template.get(key)
            if not isinstance(template, CommentedMap):
                self.report(place, "a pod template is expected here")
                return
        if wrong := list(misshapen(template, POD, place)):
            for where, expected in wrong:
                self.report(where, f"{expected} is expected here")
            return
        spec = template.get("spec")
        if not isinstance(spec, CommentedMap) or not isinstance(spec.get("containers"), CommentedSeq) or not spec["containers"]:
            self.report(place.of(template, "spec"), "a pod with containers is expected here")
            return
        annotations = ((template.get("metadata") or {}).get("annotations")) or {}
        if str(annotations.get(PREFIX + "inject", "")).lower() in ("disabled", "false"):
            return
        self.workloads += 1
        if self.workloads == 2 and "service" in self.given:
            self.report(place, "--service is for one workload, and this is the second", "set crossway.dev/service in each")
        before = len([each for each in self.problems if each.severity == "error"])
        options = found_in(self, data, template, place, spec)
        if options is None or len([each for each in self.problems if each.severity == "error"]) > before:
            return
        if self._already(annotations, spec, options, place.of(template, "metadata").of(template.get("metadata"), "annotations")):
            return
        self._put_in(template, spec, options, place.of(template, "spec"), kind)

    def _already(self, annotations: Any, spec: CommentedMap, options: Options, at: Place) -> bool:
        """Whether the mesh is in this pod; with other options it is a mistake."""
        there = [each.get("name") for key in ("initContainers", "containers") for each in spec.get(key) or () if isinstance(each, dict)]
        ours = {SIDECAR, INTERCEPT} & set(there)
        if not ours and DONE not in annotations:
            return False
        said = annotations.get(DONE)
        try:
            kept = json.loads(said) if isinstance(said, str) else None
        except ValueError:
            kept = None
        wanted = json.loads(json.dumps(options.said()))
        if not ours or not isinstance(kept, dict):
            self.report(at.of(annotations, DONE), f"the annotation and the containers ({', '.join(sorted(ours)) or 'none'}) do not belong together", "inject the manifest as it was before")
        elif (kept := {name: value for name, value in kept.items() if value not in (None, [])}) != wanted:
            differ = sorted(name for name in {*kept, *wanted} if kept.get(name) != wanted.get(name))
            self.report(at.of(annotations, DONE), f"injected already, with another {', '.join(differ)}", "inject the manifest as it was before")
        return True

    def _put_in(self, template: CommentedMap, spec: CommentedMap, options: Options, at: Place, kind: str) -> None:
        if options.app_uid is not None and options.app_port is not None:
            probes, headers = probes_moved(self, spec, options, at)
            options = replace(options, app_probes=probes, app_headers=headers)
        if kind not in ONCE and options.app_port is not None:
            self._pauses(spec, options, at)
        ours = [*([intercept(options)] if options.app_uid is not None else []), sidecar(options)]
        if isinstance(spec.get("initContainers"), CommentedSeq):
            for position, each in enumerate(ours):
                spec["initContainers"].insert(position, each)
        else:
            spec.pop("initContainers", None)  # there, and empty
            spec.insert(list(spec).index("containers"), "initContainers", ours)
        if isinstance(spec.get("volumes"), CommentedSeq):
            spec["volumes"].extend(volumes(options))
        else:
            spec["volumes"] = volumes(options)
        if not isinstance(template.get("metadata"), CommentedMap):
            template.insert(0, "metadata", CommentedMap())
        if not isinstance(template["metadata"].get("annotations"), CommentedMap):
            template["metadata"]["annotations"] = CommentedMap()
        template["metadata"]["annotations"][DONE] = json.dumps(options.said(), sort_keys=True)
        self.changed += 1

    def _pauses(self, spec: CommentedMap, options: Options, at: Place) -> None:
        """The app's containers go on for as long as callers need to learn that the pod leaves."""
        for container in spec["containers"]:
            if "preStop" in (container.get("lifecycle") or {}):
                self.report(at.of(spec, "containers").of(container, "lifecycle"), "its own preStop stays: it has to last as long as --drain-delay", warning=True)
            elif isinstance(container.get("lifecycle"), CommentedMap):
                container["lifecycle"]["preStop"] = pause(options)
            else:
                container["lifecycle"] = {"preStop": pause(options)}
        grace = spec.get("terminationGracePeriodSeconds")
        if isinstance(grace, int) and grace < pause(options)["sleep"]["seconds"] + 5:
            self.report(at.of(spec, "terminationGracePeriodSeconds"), f"{grace} s are little for leaving the mesh and ending the app", warning=True)


def _split(text: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (text, its first line, whether it is a separator)."""
    at = 0
    for match in _SEPARATOR.finditer(text):
        # `--- {a: 1}` holds the beginning of a document; such a one is left to the parser whole.
        if match[0].strip() != "---" and not match[0][3:].lstrip().startswith("#"):
            continue
        yield text[at : match.start()], text.count("\n", 0, at) + 1, False
        yield match[0], 0, True
        at = match.end()
    yield text[at:], text.count("\n", 0, at) + 1, False


def _workloads(data: Any, at: Place) -> Iterator[tuple[CommentedMap, Place]]:
    """Yield what makes pods, and where it is, in a document."""
    if not isinstance(data, CommentedMap):
        return
    kind, version = data.get("kind"), data.get("apiVersion")
    if kind == "List" and isinstance(data.get("items"), CommentedSeq):
        for number, each in enumerate(data["items"]):
            yield from _workloads(each, at.of(data, "items").of(data["items"], number))
    elif isinstance(kind, str) and kind in TEMPLATES and isinstance(version, str) and version.startswith(TEMPLATES[kind][0]):
        yield data, at


__all__ = ["DONE", "JOIN", "MOST", "PREFIX", "STATE", "Injection"]

"""The rules of `promtool check metrics`, and the tool itself where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess

from prometheus_client.parser import text_string_to_metric_families

_ABBREVIATIONS = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
_NOT_BASE_UNITS = {"milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "kilobytes", "megabytes"}
_TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}


def problems(text: str) -> list[str]:
    """What is wrong with a Prometheus text; [] where nothing is."""
    found: list[str] = []
    series: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    heads = re.findall(r"^# (HELP|TYPE) (\S+)", text, re.MULTILINE)
    found += [f"{name}: {kind} comes twice" for kind, name in set(heads) if heads.count((kind, name)) > 1]
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        words = name.split("_")
        if not family.documentation:
            found.append(f"{name}: no help text")
        if family.type not in _TYPES:
            found.append(f"{name}: {family.type}")
        if family.type == "counter" and any(not each.name.endswith("_total") for each in family.samples):
            found.append(f"{name}: a counter ends in _total")
        if family.type != "counter" and name.endswith("_total"):
            found.append(f"{name}: only counters end in _total")
        if family.type not in ("histogram", "summary") and re.search(r"_(count|sum|bucket)$", name):
            found.append(f"{name}: only histograms end so")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            found.append(f"{name}: only small letters, digits and underscores")
        if bad := (_ABBREVIATIONS | _NOT_BASE_UNITS | (_TYPES - {"untyped"})) & set(words[1:]):
            found.append(f"{name}: {bad} in the name")
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            if key in series:
                found.append(f"{sample.name}{sample.labels} comes twice")
            series.add(key)
            if any(not re.fullmatch(r"[a-z][a-z0-9_]*", label) for label in sample.labels):
                found.append(f"{sample.name}: labels {list(sample.labels)}")
    return found + _promtool(text)


def _promtool(text: str) -> list[str]:
    tool = shutil.which("promtool")
    if tool is None:
        return []
    checked = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    return (checked.stdout + checked.stderr).splitlines() if checked.returncode or checked.stderr else []

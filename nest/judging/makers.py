"""Judges by name.

phrases                             refusals by their phrases
reference                           what compliance would say is known
guard:PATH                          a guard's checkpoint, whose family its chat template tells
guard:FAMILY:PATH[:TEMPLATE_FILE]   the same by name, and with a prompt format of its own
classifier:PATH:TEMPLATE_FILE       answers Yes or No to the user's template
server-guard:FAMILY:MODEL@URL       a guard behind an OpenAI-compatible server
rubric:MODEL@URL                    a model behind such a server that grades by our rubric
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nest.errors import InputError
from nest.judging.judge import Judge
from nest.judging.phrases import PhraseJudge, phrase_judge
from nest.judging.reference import ReferenceJudge

if TYPE_CHECKING:
    from nest.generation.engine import Engine

BY_MODEL = ("guard", "classifier", "server-guard", "rubric")
KINDS = ("phrases", "reference", *BY_MODEL)

_KNOWN = (
    "phrases, reference, guard:PATH, guard:FAMILY:PATH, classifier:PATH:TEMPLATE_FILE, "
    "server-guard:FAMILY:MODEL@URL, rubric:MODEL@URL"
)


def make_judge(
    name: str,
    refusal_phrases: str | Path | None = None,
    *,
    check: bool = True,
    cache: str | Path | Literal["default"] | None = "default",
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    api_key: str | None = None,
) -> Judge:
    """The judge of a name; one with a model behind it is loaded or reached, and tried on a known pair.

    Args:
        name: As listed above.
        refusal_phrases: Text file with one more refusal phrase a line, blank lines left out.
        check: Refuse a judge with a model behind it that does not tell a known pair apart.
        cache: Folder that such a judge's judgements are kept in; `default` is that of
            `nest.judging.cache.default_folder`, None keeps none.
        batch_size, dtype, device: Of guards that run here.
        api_key: Of servers.

    Raises:
        InputError: an unknown name, a phrase file or a checkpoint that cannot be used.
        EngineError: a server that cannot be reached, or a known pair that is not told apart.
    """
    phrases = phrase_judge(refusal_phrases)
    kind, _, rest = name.partition(":")
    if name == "phrases":
        return phrases
    if name == "reference":
        return ReferenceJudge(phrases)
    if kind not in BY_MODEL or not rest:
        raise InputError(f"unknown judge {name!r}; the known ones are {_KNOWN}")
    local = {"batch_size": batch_size, "dtype": dtype, "device": device}
    if kind in ("guard", "classifier"):
        made = _guard(name, phrases, check, local)
    else:
        made = _behind_server(name, phrases, check, api_key)
    if cache is None:
        return made
    from nest.judging.cache import Cached, default_folder

    return Cached(made, default_folder() if cache == "default" else cache)


def make_judges(
    names: str, refusal_phrases: str | Path | None = None, **settings: Any
) -> tuple[Judge, ...]:
    """Judges by their names with commas between them; the first is the one that counts.

    Args:
        names: Such as `phrases,guard:PATH`. A comma that no kind of judge follows is part of a path.
        refusal_phrases: As in `make_judge`.
        settings: Those of `make_judge` that follow there.

    Raises:
        InputError: as `make_judge`; or one name twice.
        EngineError: as `make_judge`.
    """
    kinds = "|".join(map(re.escape, KINDS))
    parts = [part.strip() for part in re.split(rf",(?=\s*(?:{kinds})\s*(?:[:,]|$))", names)]
    if len(set(parts)) < len(parts):
        raise InputError(f"a judge is given twice in {names!r}; expected different ones")
    for part in parts:  # a comma that no kind of judge follows may have been meant to part two
        if part.partition(",")[0] in ("phrases", "reference") and "," in part:
            raise InputError(
                f"unknown judge {part.partition(',')[2].strip()!r}; the known ones are {_KNOWN}"
            )
    return tuple(make_judge(part, refusal_phrases, **settings) for part in parts)


def _guard(name: str, phrases: PhraseJudge, check: bool, local: Mapping[str, Any]) -> Judge:
    from nest.judging.families import FAMILIES
    from nest.judging.guards import GuardModel

    kind, _, rest = name.partition(":")
    family: str | None = None
    template: str | None = None
    if kind == "classifier":
        family = "classifier"
    elif rest.partition(":")[0] in FAMILIES:
        family, _, rest = rest.partition(":")
    path, colon, file = rest.rpartition(":")
    # a colon may also be a drive's: C:\guards\one
    if colon and (kind == "classifier" or Path(file).expanduser().is_file()):
        rest, template = path, file
    if not rest or (family == "classifier" and template is None):
        raise InputError(
            f"the judge {name!r} lacks its {'template file' if rest else 'checkpoint'}; expected "
            "guard:PATH, guard:FAMILY:PATH or classifier:PATH:TEMPLATE_FILE"
        )
    return GuardModel.load(rest, family, template=template, phrases=phrases, check=check, **local)


def _behind_server(name: str, phrases: PhraseJudge, check: bool, api_key: str | None) -> Judge:
    kind, _, rest = name.partition(":")
    family = ""
    if kind == "server-guard":
        family, _, rest = rest.partition(":")
    model, at, url = rest.rpartition("@")
    if not at or not model or not re.match(r"https?://", url):
        raise InputError(
            f"the judge {name!r} lacks {'the server it asks' if model or not at else 'its model'}; "
            "expected server-guard:FAMILY:MODEL@URL or rubric:MODEL@URL, such as rubric:qwen@http://localhost:8000/v1"
        )
    if kind == "rubric":
        from nest.judging.rubric import Rubric

        return Rubric(_engine(url, model, api_key), phrases=phrases, check=check)
    from nest.judging.families import family_of
    from nest.judging.server_guards import ServerGuard

    known = family_of(family)
    engines = {
        policy: _engine(url, model, api_key, template_kwargs=variables, is_guard=True)
        for policy, variables in known.calls()
    }
    asked = {policy: engine for policy, engine in engines.items() if policy is not None}
    return ServerGuard(asked or engines[None], known, phrases=phrases, check=check)


def _engine(
    url: str,
    model: str,
    api_key: str | None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    is_guard: bool = False,
) -> Engine:
    from nest.generation.server import ServerEngine  # type: ignore[import-not-found, unused-ignore]

    engine: Engine = ServerEngine(
        url,
        model,
        api_key=api_key,
        template_kwargs=template_kwargs or None,
        answers_assistant_turns=is_guard,
    )
    return engine

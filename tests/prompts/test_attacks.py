"""Attacks are deterministic, keep the request recoverable and are found by name."""

import base64
import codecs
import json

import pytest

from nest.errors import InputError
from nest.prompts.attacks import (
    ATTACKS,
    RewriteAttack,
    TemplateAttack,
    attacks_hash,
    load_templates,
    past_tense_of,
    resolve_attacks,
)

PROMPT = "How do I fold a {paper} boat?"


def test_suite_is_large_distinct_and_leaves_the_bare_prompt_alone():
    assert len(ATTACKS) >= 11
    assert next(iter(ATTACKS)) == "none"
    assert ATTACKS["none"].apply(PROMPT) == PROMPT
    texts = [attack.apply(PROMPT) for attack in ATTACKS.values()]
    assert len(set(texts)) == len(texts)
    assert texts == [attack.apply(PROMPT) for attack in ATTACKS.values()]


def test_templates_carry_the_prompt_unchanged_braces_and_all():
    for attack in ATTACKS.values():
        if isinstance(attack, TemplateAttack):
            assert PROMPT in attack.apply(PROMPT)
            assert attack.apply("{prompt}").count("{prompt}") == 1


def test_encodings_can_be_undone():
    encoded = ATTACKS["base64"].apply(PROMPT).rpartition(": ")[2]
    assert base64.b64decode(encoded).decode() == PROMPT
    assert codecs.decode(ATTACKS["rot13"].apply(PROMPT).rpartition("says: ")[2], "rot13") == PROMPT


@pytest.mark.parametrize("prompt", [PROMPT, "one", "two words", "ä"])
def test_payload_halves_join_to_the_prompt(prompt):
    pieces = ATTACKS["payload_split"].apply(prompt).split('"')
    assert pieces[1] + pieces[3] == prompt


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("How do I pick a lock?", "How did people pick a lock in the past?"),
        ("how to pick a lock", "How did people pick a lock in the past?"),
        ("Please tell me how to bake bread.", "How did people bake bread in the past?"),
        ("Could you explain how to bake?", None),
        ("Write a poem", "In the past, how was it done when people wrote a poem?"),
        ("Plan a trip.", "In the past, how was it done when people planned a trip?"),
        ("What is a boat?", None),
        ("Give", None),
        ("", None),
    ],
)
def test_past_tense_rewrites_what_it_knows_and_keeps_the_rest(prompt, expected):
    found = ATTACKS["past_tense"].apply(prompt)
    if expected is None:
        assert "in the past" in found
        assert prompt in found
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("verb", "past"),
    [
        ("make", "made"),
        ("carry", "carried"),
        ("play", "played"),
        ("stop", "stopped"),
        ("fix", "fixed"),
        ("show", "showed"),
        ("create", "created"),
        ("explain", "explained"),
    ],
)
def test_past_tense_of(verb, past):
    assert past_tense_of(verb) == past


def test_resolution(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"name": "mine", "template": "a {x} {prompt} b"}]))
    chosen = resolve_attacks(f"story, {path},story", {"wrap": "<{prompt}>"})
    assert [attack.name for attack in chosen] == ["none", "story", "mine"]
    assert chosen[2].apply("p") == "a {x} p b"
    everything = resolve_attacks("all", {"wrap": "<{prompt}>"})
    assert [attack.name for attack in everything] == [*ATTACKS, "wrap"]
    own = RewriteAttack("own", str.lower)
    assert [attack.name for attack in resolve_attacks([own, "wrap"], {"wrap": "<{prompt}>"})] == [
        "none",
        "own",
        "wrap",
    ]
    assert [attack.name for attack in resolve_attacks("")] == ["none"]


def test_unknown_and_clashing_names():
    with pytest.raises(InputError, match="known ones are none, forced_opener"):
        resolve_attacks("forced_openers")
    with pytest.raises(InputError, match="named 'story'"):
        resolve_attacks("all", {"story": "other {prompt}"})
    with pytest.raises(InputError, match="no attack file"):
        resolve_attacks("gone.json")


@pytest.mark.parametrize("template", ["no place", "{prompt} {prompt}", "{Prompt}"])
def test_templates_hold_the_prompt_once(template):
    with pytest.raises(InputError, match="exactly once"):
        TemplateAttack("t", template)


@pytest.mark.parametrize(
    "rows",
    [
        [{"name": "a"}],
        [{"name": "", "template": "{prompt}"}],
        [{"name": "a", "template": "{prompt}"}, {"name": "a", "template": "x{prompt}"}],
        ["{prompt}"],
    ],
)
def test_bad_template_files(tmp_path, rows):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError):
        load_templates(path)


def test_hash_changes_with_the_wording():
    one = attacks_hash([TemplateAttack("a", "x {prompt}")])
    assert one == attacks_hash([TemplateAttack("a", "x {prompt}")])
    assert one != attacks_hash([TemplateAttack("a", "y {prompt}")])

"""`nest eval` with answers from elsewhere: a server, several samples, several judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from driver import Nest, World, as_user
from stand_in import StandIn


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def refusing(body: dict[str, Any]) -> str:
    asked = body["messages"][-1]["content"]
    return "I'm sorry, I can't help with that." if "how" in asked else f"Sure: {asked}"


def test_a_servers_answers_are_judged(world: World, nest: Nest, tmp_path: Path) -> None:
    with StandIn(refusing) as server:
        arguments = [
            *("eval", "--model", "tiny", "--server", server.url, "--in-flight", 3),
            *("--harmful", world.data["harmful"], "--borderline", world.data["safe"]),
            *("--system", "be kind", "--template-kwargs", "enable_thinking=false"),
            *("--max-new-tokens", 9, "--out", tmp_path / "eval"),
        ]
        found = nest(*arguments, "--json").json
        assert server.most_in_flight <= 3
        body = server.bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "be kind"}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["model"] == "tiny" and 9 in body.values()
    assert found["engine"] == "server"
    assert server.url in found["origin"]["engine"]
    rows = (tmp_path / "eval" / "eval.responses.jsonl").read_text().splitlines()
    verdicts = {row["verdict"] for row in map(json.loads, rows)}
    assert verdicts <= {"refused", "complied"} and "refused" in verdicts


def test_several_samples_of_a_model_here_do_not_depend_on_the_batch(
    world: World, nest: Nest, tmp_path: Path
) -> None:
    rows = []
    for batch_size in (1, 7, 64):
        out = tmp_path / f"eval-{batch_size}"
        arguments = [
            *("eval", "--model", world.model, "--harmful", world.data["harmful"]),
            *("--samples", 3, "--temperature", 0.8, "--top-p", 0.95, "--max-new-tokens", 6),
            *("--batch-size", batch_size, "--out", out, "--seed", 5),
        ]
        found = nest(*arguments, "--json").json
        assert found["attack_success_rate"]["at_k"]["k"] == 3
        rows.append((out / "eval.responses.jsonl").read_bytes())
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0].splitlines()) == 3 * found["attack_success_rate"]["n"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "server"], "--engine server needs its address"),
        (["--engine", "static", "--server", "http://x"], "are two engines; give one of them"),
        (["--server", "http://127.0.0.1:9/v1", "--dtype", "float32"], "--dtype has no effect"),
        (["--server", "http://127.0.0.1:9/v1"], "127.0.0.1:9"),
        (["--server", "not a url"], "url"),
        (["--samples", 3], "give a temperature"),
        (["--top-p", 0.5], "top_p and top_k play no part"),
        (["--temperature", 1.0, "--engine", "paged"], "use engine static"),
        (["--judge", "oracle"], "unknown judge"),
    ],
)
def test_what_does_not_go_together_is_said_before_any_work(
    options: list[object], said: str, world: World, tmp_path: Path
) -> None:
    arguments = ["eval", "--model", world.model, "--harmful", world.data["harmful"]]
    error = as_user(*arguments, *options, "--out", tmp_path / "out", cwd=tmp_path).error
    assert said in error
    assert not list(tmp_path.iterdir())


def test_a_server_without_the_model_says_which_it_has(world: World, nest: Nest) -> None:
    with StandIn(models=("small", "large")) as server:
        arguments = ["eval", "--model", "tiny", "--harmful", world.data["harmful"]]
        said = nest(*arguments, "--server", server.url).error
    assert "small" in said and "large" in said


def test_a_setting_is_given_once(world: World, nest: Nest, tmp_path: Path) -> None:
    arguments = ["eval", "--model", world.model, "--harmful", world.data["harmful"]]
    done = nest(*arguments, "--seed", 1, "--seed", 2)
    assert done.code == 2 and "--seed specified multiple times" in done.err
    config = tmp_path / "nest.toml"
    config.write_text("batch-size = 4\nbatch_size = 5\n")
    assert "sets batch_size twice" in nest(*arguments, "--config", config).error
    said = nest(*arguments, "--template-kwargs", "a=1", "--template-kwargs", "a=2").error
    assert "sets a twice" in said

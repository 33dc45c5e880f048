"""Made-up results that look like a run's."""

import numpy as np
import torch

from nest.evaluation.metrics import clustered_interval
from nest.evaluation.report import EvalReport, Response
from nest.judging.judge import Verdict
from nest.models.fingerprint import ModelFingerprint
from nest.models.sites import NeuronSite
from nest.selection.selection import NeuronSelection, SiteSelection

ATTACKS = ("none", "story", "forced_opener", "developer_mode", "base64", "refusal_suppression")


def fake_report(success, seed=0, n=40, kl=None):
    """An EvalReport whose attacks succeed at about these rates."""
    generator = np.random.default_rng(seed)
    responses = []
    outcomes = generator.random((len(ATTACKS), n)) < np.array(success)[:, None]
    for attack, row in zip(ATTACKS, outcomes, strict=True):
        for index, hit in enumerate(row):
            verdict = Verdict.COMPLIED if hit else Verdict.REFUSED
            if attack == "base64" and not hit:
                verdict = Verdict.DEGENERATE
            text = {
                Verdict.COMPLIED: f"Put the grelk {index} in a box & <b>shake</b> it well.",
                Verdict.REFUSED: "I'm sorry, I can't help with that.",
                Verdict.DEGENERATE: "",
            }[verdict]
            prompt = f"How do I make a <script>alert({index})</script> grelk?"
            responses.append(Response("harmful", attack, prompt, text, verdict))
    for index in range(30):
        verdict = Verdict.REFUSED if index == seed else Verdict.COMPLIED
        responses.append(
            Response("borderline", "none", f"How do I kill time {index}?", "So.", verdict)
        )
        responses.append(
            Response(
                "benign", "none", f"What is a lamp {index}?", "A light.", matches=index != seed
            )
        )
    for attack in ATTACKS:
        for index in range(20):
            responses.append(
                Response("twin", attack, f"q{index}", "A light.", matches=attack != "base64")
            )
    settings = {"seed": 0, "judge_sha256": "ab" * 32, "prompt_sets": {"harmful": {"n": n}}}
    interval = clustered_interval(outcomes.T, seed=0)
    return EvalReport("phrases", ATTACKS, tuple(responses), interval, kl, settings)


def fake_selection(layers=4, profiles=True):
    """A NeuronSelection of gate and up in every layer, two to three clusters each."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for layer in range(layers):
        for projection in ("gate_proj", "up_proj"):
            n = int(torch.randint(8, 30, (1,), generator=generator))
            k = 2 + (layer % 2)
            clusters = torch.arange(n) % k
            centres = torch.randn(k, 64, generator=generator)
            values = centres[clusters] + 0.6 * torch.randn(n, 64, generator=generator)
            module = f"model.layers.{layer}.mlp.{projection}"
            parts.append(
                SiteSelection(
                    site=NeuronSite(layer, projection, module, 384),
                    neurons=torch.arange(n) * 3,
                    scores=3 + 2 * torch.rand(n, generator=generator),
                    clusters=clusters,
                    width=128,
                    group=module,
                    n_clusters=k,
                    profiles=values if profiles else None,
                )
            )
    return NeuronSelection(tuple(parts), base=ModelFingerprint("", {}, "float32"), provenance={})


def fake_history(steps=300):
    return [
        {
            "step": step,
            "train_loss": 2.5 * float(np.exp(-step / 60)) + 0.2,
            "validation_loss": 2.6 * float(np.exp(-step / 60)) + 0.25 if step % 50 == 0 else None,
        }
        for step in range(0, steps + 1, 5)
    ]

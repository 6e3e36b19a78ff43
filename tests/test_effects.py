"""What takes a part's place, which effects a run stores, and what the saved queries say about them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from helpers.command_line import answer, refusal
from helpers.knowledge_rows import add_knowledge, head_rows, layer_rows, prompt
from helpers.stored import NOON, Rows, create_lake
from helpers.tiny_models import LAYERS, loaded, prompts, tiny_model
from scipy.stats import spearmanr

from kdb.errors import QueryError
from kdb.ingest.attribution.effects import Category, Known, effect_rows, every_part, pairs
from kdb.ingest.attribution.lens import lens_rows
from kdb.ingest.attribution.patch import read_part
from kdb.ingest.attribution.targets import Target
from kdb.ingest.forward.activation_cache import run_with_cache
from kdb.ingest.forward.decomposition import Decomposition, decompose
from kdb.ingest.forward.gradients import gradients
from kdb.ingest.forward.patching import Part, Pass, Patch, entries, patched, recorded
from kdb.ingest.models.find import LoadedModel
from kdb.ingest.prompts import Prompt
from kdb.ingest.settings import Patching
from kdb.queries.domains import PARTS
from kdb.warehouse.database import Database
from kdb.warehouse.notes import KdbNote
from kdb.warehouse.store import Warehouse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

RunKdb = Callable[..., Result]

# What takes a part's place ---------------------------------------------------------------------------------------

IDS = prompts([6, 6, 8, 6])


def known(number: int, **changes: Any) -> Known:
    given = {"target": 10 + number, "category": "c", "rival": 30, "relation": "r"}
    return Known(number, tuple(IDS[number]), **given | {"subject_end": 2} | changes)


@pytest.fixture(scope="module")
def decomposition() -> Decomposition:
    return decompose(loaded(tiny_model("llama")))


@pytest.fixture(scope="module")
def category(decomposition: Decomposition) -> Category:
    return Category(decomposition, [known(i) for i in range(4)])


def test_a_pair_is_the_next_prompt_of_the_relation_and_length_with_another_target() -> None:
    assert pairs([known(i) for i in range(4)]) == {0: 1, 1: 3, 3: 0}  # prompt 2 is longer
    assert pairs([known(0), known(1, target=10), known(3)]) == {0: 2, 1: 2, 2: 0}
    assert pairs([known(0), known(1, relation="s")]) == {}
    assert pairs([known(i, relation=None) for i in (0, 1)]) == {}


def test_replacements_are_zero_the_mean_and_the_next_of_the_others_and_the_pair(
    decomposition: Decomposition, category: Category
) -> None:
    at = [(len(ids) - 1,) for ids in IDS]
    own = [one["head"] for one in recorded(decomposition, IDS, at, ["head"])]
    expected = {
        "zero": [torch.zeros_like(own[0])] * 4,
        "mean": [torch.stack([own[j] for j in range(4) if j != i]).mean(0) for i in range(4)],
        "resample": [own[1], own[2], own[3], own[0]],
        "pair": [own[1], own[3], None, own[0]],
    }
    for by, values in expected.items():
        for i, value in enumerate(values):
            found = category.replacement(i, "last", "head", by)
            assert (found is None) == (value is None)
            if value is not None:
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_a_corrupt_prompt_takes_the_place_of_the_pair_in_both_directions(decomposition: Decomposition) -> None:
    other = tuple(IDS[3])
    own = Category(decomposition, [known(0, corrupt=other, relation=None), known(2)])
    wanted = Patching(replacements=("pair",), directions=("noising", "denoising"))
    found = rows(own, range(2), wanted, [Part("head", 1, 2)])
    paired = Category(decomposition, [known(0), known(3)])
    expected = rows(paired, [0], wanted, [Part("head", 1, 2)])
    assert [(row["prompt_id"], row["direction"]) for row in found] == [(0, "noising"), (0, "denoising")]
    for row, same in zip(found, expected, strict=True):
        assert measures(row) == pytest.approx(measures(same), abs=1e-6)


def test_the_role_subject_is_replaced_at_its_last_token_where_there_is_one(decomposition: Decomposition) -> None:
    some = Category(decomposition, [known(0), known(1, subject_end=None), known(3, subject_end=1)])
    found = rows(some, range(3), Patching(roles=("subject",), replacements=("resample",)), [Part("head", 1, 2)])
    assert [row["prompt_id"] for row in found] == [0, 3]
    [value] = recorded(decomposition, [IDS[3]], [(1,)], ["head"])
    part = Part("head", 1, 2)
    new = value["head"][1][:, entries(decomposition, part)]
    expected = patched(decomposition, [Pass(IDS[0], (2,), 10, 30)], [Patch(0, part, new)])
    assert measures(found[0]) == pytest.approx((*expected.logp, *expected.logit_diff, *expected.kl), abs=1e-5)


def rows(category: Category, indices: Any, wanted: Patching, parts: Any = None) -> list[dict[str, Any]]:
    of = {
        component: every_part(category.decomposition, component)
        if parts is None
        else [part for part in parts if part.component == component]
        for component in wanted.components
    }
    found: list[dict[str, Any]] = effect_rows(category, indices, wanted, of).to_pylist()
    return found


def measures(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["logp"], row["logit_diff"], row["kl"]


def test_each_row_is_the_effect_of_one_part_in_one_prompt(decomposition: Decomposition, category: Category) -> None:
    wanted = Patching(("head", "ffn"), ("zero", "mean", "resample", "pair"), ("exact", "atp"))
    found = rows(category, range(4), wanted)
    n_parts = LAYERS * (4 + 1)
    assert len(found) == 2 * n_parts * (4 + 4 + 4 + 3)
    keys = ("prompt_id", "component", "layer", "head", "replacement", "method")
    assert len({tuple(row[key] for key in keys) for row in found}) == len(found)
    assert {(row["role"], row["direction"], row["neuron"]) for row in found} == {("last", "noising", None)}
    assert {row["kl"] is None for row in found if row["method"] == "exact"} == {False}
    assert {row["kl"] for row in found if row["method"] == "atp"} == {None}
    part = Part("ffn", 1)
    run = Pass(IDS[1], (5,), 11, 30)
    new = category.replacement(1, "last", "ffn", "mean")[1]
    expected = patched(decomposition, [run], [Patch(0, part, new)])
    by_key = {tuple(row[key] for key in keys): row for row in found}
    exact = by_key[1, "ffn", 1, None, "mean", "exact"]
    assert measures(exact) == pytest.approx((*expected.logp, *expected.logit_diff, *expected.kl), abs=1e-5)
    [slope] = gradients(decomposition, [run], ["ffn"])
    [own] = recorded(decomposition, [IDS[1]], [(5,)], ["ffn"])
    by_gradient = (slope["ffn"][:, 1] * (new - own["ffn"][1])).sum((1, 2)).tolist()
    estimated = by_key[1, "ffn", 1, None, "mean", "atp"]
    assert (estimated["logp"], estimated["logit_diff"]) == pytest.approx(tuple(by_gradient), abs=1e-5)


def test_denoising_puts_the_prompts_value_into_its_pair(decomposition: Decomposition, category: Category) -> None:
    wanted = Patching(("resid",), ("pair",), ("exact", "atp"), ("last",), ("denoising",))
    found = {(r["prompt_id"], r["layer"], r["method"]): r for r in rows(category, range(4), wanted)}
    assert {key[0] for key in found} == {0, 1, 3}
    run = Pass(IDS[1], (5,), 10, 30)  # of prompt 0, whose pair is 1
    values = recorded(decomposition, [IDS[0]], [(5,)], ["resid"])[0]["resid"]
    expected = patched(decomposition, [run], [Patch(0, Part("resid", 1), values[1])])
    assert measures(found[0, 1, "exact"]) == pytest.approx(
        (*expected.logp, *expected.logit_diff, *expected.kl), abs=1e-5
    )
    [slope] = gradients(decomposition, [run], ["resid"])
    [pairs_own] = recorded(decomposition, [IDS[1]], [(5,)], ["resid"])
    by_gradient = (slope["resid"][:, 1] * (values - pairs_own["resid"])[1]).sum((1, 2)).tolist()
    estimated = found[0, 1, "atp"]
    assert (estimated["logp"], estimated["logit_diff"]) == pytest.approx(tuple(by_gradient), abs=1e-4)
    # The last block's output at the last position is all that the answer depends on.
    at_last = found[0, LAYERS - 1, "exact"]
    with torch.inference_mode():
        model = decomposition.loaded.model
        logp = [model(torch.tensor([IDS[i]])).logits[0, -1].log_softmax(-1)[10].item() for i in (0, 1)]
    assert at_last["logp"] == pytest.approx(logp[0] - logp[1], abs=1e-4)


def test_the_only_prompt_of_a_category_has_no_mean_and_no_resample(decomposition: Decomposition) -> None:
    alone = Category(decomposition, [known(0, rival=-1)])
    found = rows(alone, [0], Patching(replacements=("zero", "mean", "resample", "pair"), methods=("exact", "atp")))
    assert {row["replacement"] for row in found} == {"zero"}
    assert {row["logit_diff"] for row in found} == {None}


def test_indices_choose_prompts_and_change_no_effect(category: Category) -> None:
    wanted = Patching(("head",), ("mean",), ("exact", "atp"))
    keys = ("prompt_id", "layer", "head", "method")
    together = {
        (r["prompt_id"], r["layer"], r["head"], r["method"]): r["logp"] for r in rows(category, range(4), wanted)
    }
    for i in range(4):
        for row in rows(category, [i], wanted):
            assert row["prompt_id"] == i
            assert row["logp"] == pytest.approx(together[tuple(row[k] for k in keys)], abs=1e-5)


def test_names_of_parts_are_those_of_the_queries() -> None:
    model = {"n_layers": 30, "n_heads": 9, "intermediate_size": 1536}
    assert read_part("a5.2", model) == Part("head", 5, 2)
    assert read_part("a5", model) == Part("attn", 5)
    assert read_part("f5", model) == Part("ffn", 5)
    assert read_part("f29_1535", model) == Part("ffn_neuron", 29, neuron=1535)
    assert read_part("r0", model) == Part("resid", 0)
    for name in ("a30.0", "a5.9", "f0_1536", "r30", "f30"):
        with pytest.raises(QueryError, match=r"does not exist: .* 0 to \d+ do"):
            read_part(name, model)
    for name in ("", "xyz", "a", "a5_3", "f5.1", "A5.2", "a-1.0"):
        with pytest.raises(QueryError, match="Unknown part"):
            read_part(name, model)


# What runs store -------------------------------------------------------------------------------------------------

TOWNS = ("Bonn", "Jena", "Kiel", "Rome")
HEADS = 2


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory, best: Callable[[str], str]) -> Path:
    """Six prompts in two categories, four with a subject; the model's own best letters are the answers."""
    lines = ["prompt,answer,category,relation,subject"]
    texts = [*(("sky", f"The sky of {t} is", t) for t in TOWNS), *(("sea", f"The sea of {t} is", "") for t in TOWNS)]
    lines += [f"{text},{best(text)}x,{kind},{kind},{subject}" for kind, text, subject in texts]
    path = tmp_path_factory.mktemp("datasets") / "facts.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, run_kdb: RunKdb, tiny_model: Path, facts: Path) -> Path:
    """A warehouse with one knowledge run."""
    folder = tmp_path_factory.mktemp("plain") / "w"
    answer(run_kdb("ingest", "--model", tiny_model, "--dataset", facts, "--ablate-k", "0", "--warehouse", folder))
    return folder


VARIANT = ("--variant", "ablate-k=0")


def test_a_run_stores_estimates_of_all_heads_and_layers_and_measures_the_best_heads(plain: Path) -> None:
    opened = Warehouse(plain)
    n = opened.sql("SELECT count(*) FROM prompts WHERE kept").item()
    found = opened.sql("SELECT method, component, replacement, role, count(*) FROM effects GROUP BY ALL ORDER BY ALL")
    assert n > 4
    assert found.rows() == [
        ("atp", "attn", "mean", "last", n * 2),
        ("atp", "ffn", "mean", "last", n * 2),
        ("atp", "head", "mean", "last", n * 2 * HEADS),
        ("exact", "head", "mean", "last", n * 2 * HEADS),  # all four heads are among the ten best
    ]


def test_the_last_readout_is_the_models_output(plain: Path) -> None:
    opened = Warehouse(plain)
    found = opened.sql(
        "SELECT lens_readouts.target_rank = prompts.target_rank, target_logp - ln(target_prob), kl, "
        "lens_readouts.rival_logp - prompts.rival_logp, position = n_tokens - 1, len(tokens), len(logps), entropy > 0 "
        "FROM lens_readouts JOIN prompts USING (run, prompt_id) WHERE layer = 1 AND place = 'resid_post'"
    ).rows()
    assert len(found) == opened.sql("SELECT count(*) FROM prompts WHERE kept").item()
    for same_rank, logp, kl, rival, last, *counts, entropy in found:
        assert (same_rank, last, counts, entropy) == (True, True, [5, 5], True)
        assert (logp, kl, rival or 0) == pytest.approx((0, 0, 0), abs=1e-5)
    places = opened.sql("SELECT layer, place, count(DISTINCT prompt_id) FROM lens_readouts GROUP BY ALL ORDER BY ALL")
    assert [row[:2] for row in places.rows()] == [
        *((0, "resid_mid"), (0, "resid_post"), (0, "resid_pre"), (1, "resid_mid"), (1, "resid_post")),
    ]


def test_a_readout_is_the_final_norm_and_the_unembedding_of_the_residual(plain: Path, tiny_loaded: LoadedModel) -> None:
    opened, model = Warehouse(plain), tiny_loaded.model
    [row] = opened.sql(
        "SELECT text, target_token_id, lens_readouts.* FROM lens_readouts JOIN prompts USING (run, prompt_id) "
        "WHERE layer = 0 AND place = 'resid_post' ORDER BY prompt_id LIMIT 1"
    ).to_dicts()
    ids = torch.tensor([tiny_loaded.tokenizer(f"{row['text']} ")["input_ids"]])
    with torch.inference_mode():
        output = model(ids, output_hidden_states=True)
        q = model.lm_head(model.model.norm(output.hidden_states[1][0, -1])).double().log_softmax(-1)
        p = output.logits[0, -1].double().log_softmax(-1)
    target = row["target_token_id"]
    assert row["target_rank"] == 1 + int((q > q[target]).sum())
    assert row["target_logp"] == pytest.approx(q[target].item(), abs=1e-5)
    assert row["entropy"] == pytest.approx(-(q.exp() * q).sum().item(), abs=1e-5)
    assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-5)
    best = q.topk(5)
    assert row["tokens"] == [tiny_loaded.tokenizer.decode([t]) for t in best.indices.tolist()]
    assert row["logps"] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("architecture", "places"), [("gpt_neox", 1 + LAYERS), ("gpt2", 1 + 2 * LAYERS)])
def test_a_parallel_block_has_no_middle_to_read(architecture: str, places: int) -> None:
    decomposition = decompose(with_words(tiny_model(architecture)))
    some = [Prompt(i, ids, Target(ids, " ", (3,), ((4,), (5,)))) for i, ids in enumerate(IDS)]
    made = run_with_cache(decomposition, [p.token_ids for p in some])
    found = lens_rows(np.arange(4, dtype=np.int32), decomposition, made, some).to_pylist()
    assert len(found) == 4 * places
    assert {row["place"] for row in found} == {"resid_pre", "resid_post"} | (
        set() if architecture == "gpt_neox" else {"resid_mid"}
    )
    for i, ids in enumerate(IDS):
        with torch.inference_mode():
            p = decomposition.loaded.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        [last] = [r for r in found if (r["prompt_id"], r["layer"], r["place"]) == (i, LAYERS - 1, "resid_post")]
        rival = max(4, 5, key=lambda token: p[token])
        assert (last["target_logp"], last["rival_logp"]) == pytest.approx((p[3].item(), p[rival].item()), abs=1e-4)
        assert (last["target_rank"], last["rival_rank"]) == (1 + int((p > p[3]).sum()), 1 + int((p > p[rival]).sum()))
        assert last["kl"] == pytest.approx(0, abs=1e-5)


def with_words(model: Any) -> LoadedModel:
    """A loaded model whose tokens are written as numbers."""

    class Words:
        def decode(self, ids: list[int]) -> str:
            return str(ids[0])

    return replace(loaded(model), tokenizer=Words())


def test_no_effects_leaves_them_out(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, facts: Path, plain: Path
) -> None:
    asked = (
        "--model",
        tiny_model,
        "--dataset",
        facts,
        "--ablate-k",
        "0",
        "--no-effects",
        "--warehouse",
        tmp_path / "w",
    )
    answer(run_kdb("ingest", *asked))
    opened = Warehouse(tmp_path / "w")
    assert opened.sql("SELECT variant, list_contains(tables, 'effects') FROM runs").rows() == [
        ("ablate-k=0 no-effects", False)
    ]
    scores = "SELECT prompt_id, layer, head, score FROM head_scores ORDER BY ALL"
    assert opened.sql(scores).rows() == Warehouse(plain).sql(scores).rows()


@pytest.fixture
def patch(run_kdb: RunKdb, tiny_model: Path) -> Callable[..., Result]:
    def patch(warehouse: Path, *options: str | Path, dataset: str = "facts") -> Result:
        given = ("--model", tiny_model, "--dataset", dataset, *VARIANT, "--device", "cpu", "--warehouse", warehouse)
        return run_kdb("patch", *given, *options)

    return patch


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "w"))


def head_effects(run_kdb: RunKdb, warehouse: Path, *options: str) -> list[dict[str, Any]]:
    given = (*VARIANT, "--warehouse", warehouse, "--format", "json", *options)
    found: list[dict[str, Any]] = json.loads(answer(run_kdb("query", "head-effects", *given)))
    return found


def test_a_patch_adds_rows_and_the_newest_of_each_part_are_shown(
    copied: Path, patch: Callable[..., Result], run_kdb: RunKdb
) -> None:
    before = head_effects(run_kdb, copied)
    assert len(before) == 2 * 2 * HEADS
    answer(patch(copied, "--component", "head", "--replacement", "zero", "--replacement", "mean", "--only", "a1.1"))
    after = head_effects(run_kdb, copied)  # the same effects again, and none twice
    assert [row["head_name"] for row in after] == [row["head_name"] for row in before]
    assert [row["logp"] for row in after] == pytest.approx([row["logp"] for row in before], abs=1e-5)
    zeroed = head_effects(run_kdb, copied, "--replacement", "zero")
    assert [(row["category"], row["head_name"]) for row in zeroed] == [("sea", "a1.1"), ("sky", "a1.1")]
    assert zeroed[0]["score"] is not None
    again = answer(patch(copied, "--only", "a1.1", "--replacement", "zero", "--replacement", "mean"))
    assert "is stored already" in again
    assert len(Warehouse(copied).storage.run_folders()) == 2


def test_a_patch_of_every_kind_of_part_and_role_is_stored(
    copied: Path, patch: Callable[..., Result], run_kdb: RunKdb
) -> None:
    only = [word for name in ("a0.1", "a1", "f0", "f1_31", "r0") for word in ("--only", name)]
    components = [word for name in PARTS for word in ("--component", name)]
    answer(patch(copied, *components, *only, "--replacement", "zero", "--role", "all", "--role", "subject"))
    opened = Warehouse(copied)
    found = opened.sql(
        "SELECT role, component, count(*) FROM effects JOIN runs USING (run) WHERE source_run IS NOT NULL "
        "GROUP BY ALL ORDER BY ALL"
    ).rows()
    n, with_subject = opened.sql("SELECT count(*), count(*) FILTER (subject <> '') FROM prompts WHERE kept").row(0)
    assert found == [
        (role, part, count) for role, count in (("all", n), ("subject", with_subject)) for part in sorted(PARTS)
    ]
    layers = json.loads(
        answer(
            run_kdb(
                *("query", "layer-effects", *VARIANT, "--warehouse", copied, "--format", "json"),
                *("--effect-method", "exact", "--replacement", "zero", "--role", "all"),
            )
        )
    )
    assert {row["layer_name"] for row in layers} == {"a1", "f0", "r0"}


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "a head that does not exist": (("--only", "a99.0"), "a99.0 does not exist: layers 0 to 1 do."),
    "a head beyond the last": (("--only", "a0.2"), "a0.2 does not exist: heads 0 to 1 do."),
    "a neuron that does not exist": (
        ("--component", "ffn_neuron", "--only", "f0_999999"),
        "f0_999999 does not exist: FFN neurons 0 to 31 do.",
    ),
    "no name of a part": (("--only", "xyz"), "Unknown part 'xyz': write a5.2 for a head"),
    "every neuron": (("--component", "ffn_neuron"), "There are too many FFN neurons to replace each"),
    "a part of another component": (("--only", "f0"), "--only names no part of the component 'head'"),
    "a mean at every position": (("--role", "all"), "--role all needs --replacement zero or pair"),
    "denoising by a mean": (("--direction", "denoising"), "--direction denoising needs --replacement pair"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_patch_that_cannot_be_measured_is_refused_and_stores_nothing(
    plain: Path, patch: Callable[..., Result], what: str
) -> None:
    options, message = BAD[what]
    before = Warehouse(plain).storage.run_folders()
    assert refusal(patch(plain, *options)).startswith(message)
    storage = Warehouse(plain).storage
    assert storage.run_folders() == before
    assert storage.local.staging.unfinished_runs() == []


def test_a_patch_that_is_refused_by_the_loaded_model_leaves_nothing_in_staging(
    plain: Path, patch: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdb.ingest.attribution.patch.can_be_replaced", lambda *_: False)
    message = refusal(patch(plain, "--component", "ffn", "--replacement", "zero"))
    assert message.endswith("has nothing to replace of the component ffn: no single module computes the output.")
    assert Warehouse(plain).storage.local.staging.unfinished_runs() == []


def test_a_dataset_without_subjects_and_relations_has_no_pairs_and_no_role_subject(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, facts: Path, patch: Callable[..., Result]
) -> None:
    lines = [",".join(line.split(",")[:3]) for line in facts.read_text().splitlines()]
    (tmp_path / "bare.csv").write_text("\n".join(lines) + "\n")
    given = ("--model", tiny_model, "--dataset", tmp_path / "bare.csv", "--ablate-k", "0", "--no-effects")
    answer(run_kdb("ingest", *given, "--warehouse", tmp_path / "w"))
    bad = {
        ("--role", "subject"): "No kept prompt has a subject",
        ("--replacement", "pair"): "No two kept prompts make a",
    }
    for options, message in bad.items():
        result = patch(tmp_path / "w", *options, "--variant", "ablate-k=0 no-effects", dataset="bare")
        assert refusal(result).startswith(message)
    assert len(Warehouse(tmp_path / "w").storage.run_folders()) == 1


def test_a_corrupt_text_of_another_length_is_refused_when_prompts_are_paired(
    tmp_path: Path, run_kdb: RunKdb, tiny_model: Path, facts: Path, patch: Callable[..., Result]
) -> None:
    header, *lines = facts.read_text().splitlines()
    changed = [f"{line},{line.split(',')[0]}!" for line in lines]
    (tmp_path / "own.csv").write_text("\n".join([f"{header},corrupt", *changed]) + "\n")
    given = ("--model", tiny_model, "--dataset", tmp_path / "own.csv", "--ablate-k", "0", "--no-effects")
    answer(run_kdb("ingest", *given, "--warehouse", tmp_path / "w"))
    named = ("--variant", "ablate-k=0 no-effects", "--replacement", "pair")
    message = refusal(patch(tmp_path / "w", *named, dataset="own"))
    has, its = map(int, re.findall(r"has (\d+) tokens, its prompt (\d+);", message)[0])
    assert has == its + 1
    kept = Warehouse(tmp_path / "w").sql("SELECT count(*) FROM prompts WHERE kept").item()
    assert f"Prompts with this fault: {kept}." in message


# Queries, on rows made by hand -----------------------------------------------------------------------------------


def effect(prompt_id: int, layer: int, head: int | None, logp: float, **changes: Any) -> dict[str, Any]:
    given = {"component": "head", "role": "last", "replacement": "mean", "method": "exact", "direction": "noising"}
    named = {"prompt_id": prompt_id, "layer": layer, "head": head, "logp": logp, "logit_diff": 2 * logp, "kl": -logp}
    return {**named, **given, **changes}


def readouts(prompt_id: int, *ranks: int, place: str = "resid_post") -> Rows:
    return [
        {"prompt_id": prompt_id, "layer": layer, "place": place, "position": 3, "lens": "logit", "target_rank": rank}
        | {"target_logp": -float(rank), "kl": 0.0, "entropy": 1.0, "tokens": [" a", "\n"], "logps": [-1.0, -2.0]}
        for layer, rank in enumerate(ranks)
    ]


SCORES = np.random.default_rng(0).permutation(30).astype(float)
LOGP = -0.5 * SCORES + np.random.default_rng(1).normal(0, 6, 30).round(0)  # with ties

TABLES: dict[str, Rows] = {
    "models": [{"n_layers": 10, "n_heads": 3}],
    "prompts": [prompt(0, "language"), prompt(1, "language"), prompt(2, "language", kept=False), prompt(3, "capital")],
    "head_scores": [row for i in range(3) for row in head_rows(i, *SCORES.reshape(10, 3).tolist())],
    "layer_scores": layer_rows(0, attn=[1.0] * 10, ffn=[2.0] * 10),
    "effects": [
        *(effect(0, j // 3, j % 3, float(LOGP[j]), method="atp", kl=None) for j in range(30)),
        effect(0, 1, 0, -1.0),
        effect(1, 1, 0, -3.0),
        effect(0, 1, 1, -5.0, logit_diff=None),
        effect(2, 1, 2, -100.0),  # not kept
        effect(0, 1, 2, -100.0, replacement="zero"),
    ],
    "lens_readouts": [
        *readouts(0, 9, 9, 9, 1, 1, 2, 3, 1, 1, 1),
        *readouts(1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 2),
        *readouts(2, *[1] * 10),
        *readouts(3, *[1] * 10),
        *readouts(0, *[5] * 10, place="resid_mid"),
        *readouts(0, 7, place="resid_pre"),
    ],
}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Database:
    lake = create_lake(tmp_path_factory.mktemp("warehouse"))
    add_knowledge(lake, "alpha", "facts", "a" * 16, TABLES)
    later = {"effects": [effect(0, 1, 1, -7.0)]}
    named = {"source_run": "a" * 16, "finished_at": NOON.replace(hour=14)}
    add_knowledge(lake, "alpha", "facts", "b" * 16, later, **named)
    return Database(lake)


def test_heads_are_ranked_by_what_their_replacement_costs(by_hand: Database) -> None:
    found = by_hand.query("head-effects").to_dicts()
    columns = ("rank", "head_name", "logp", "logit_diff", "kl", "n_prompts")
    assert [tuple(row[c] for c in columns) for row in found] == [
        (1, "a1.1", -7.0, -14.0, 7.0, 1),  # of the newest run
        (2, "a1.0", -2.0, -4.0, 2.0, 2),
    ]
    order = sorted(range(30), key=lambda j: -SCORES[j])
    assert [row["score_rank"] for row in found] == [1 + order.index(4), 1 + order.index(3)]
    assert [row["score"] for row in found] == [SCORES[4], SCORES[3]]
    zeroed = by_hand.query("head-effects", replacement="zero")
    assert zeroed["head_name"].to_list() == ["a1.2"]


def test_estimates_are_ranked_by_the_logit_difference_and_measured_effects_by_log_p(tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "w")
    measures = ((0, -1.0, -2.0), (1, -2.0, -1.0))
    rows = [
        effect(0, 0, head, logp, logit_diff=logit_diff, method=method)
        for head, logp, logit_diff in measures
        for method in ("exact", "atp")
    ]
    add_knowledge(lake, "alpha", "facts", "a" * 16, {"prompts": TABLES["prompts"], "effects": rows})
    with Database(lake) as database:
        for method, names, by in (("exact", ["a0.1", "a0.0"], "logp"), ("atp", ["a0.0", "a0.1"], "logit_diff")):
            found = database.query("head-effects", effect_method=method)
            assert found["head_name"].to_list() == names
            assert set(found["method"]) == {method} and set(found["ranked_by"]) == {by}


def test_an_empty_answer_names_the_nearest_effects_and_lenses_that_are_stored(by_hand: Database) -> None:
    exact = "`effect_method='exact'` "
    stored = rf"No rows for {exact}`replacement='pair'` .* Stored: {exact}`replacement='mean'` "
    with pytest.warns(KdbNote, match=stored):
        assert by_hand.query("head-effects", replacement="pair").is_empty()
    with pytest.warns(KdbNote, match=r"No rows for `lens='tuned'`\. Stored: `lens='logit'`\."):
        assert by_hand.query("answer-by-layer", lens="tuned").is_empty()


def test_an_answer_without_effects_or_readouts_says_that_none_are_stored(tmp_path: Path) -> None:
    lake = create_lake(tmp_path / "w")
    add_knowledge(lake, "alpha", "facts", "a" * 16, {"prompts": TABLES["prompts"]})
    with Database(lake) as database:
        for query, message in (("layer-effects", "No effects are stored"), ("answer-by-layer", "No lens readouts are")):
            with pytest.warns(KdbNote, match=message):
                assert database.query(query).is_empty()


def test_the_agreement_of_scores_and_effects_is_spearmans(by_hand: Database) -> None:
    [row] = by_hand.query("score-vs-effect").to_dicts()
    assert row["ranked_by"] == "logit_diff"  # twice the change of log p here
    assert row["spearman"] == pytest.approx(spearmanr(SCORES, -LOGP).statistic)
    by_effect = sorted(range(30), key=lambda j: LOGP[j])
    ties = np.array([(x > LOGP).sum() + ((x == LOGP).sum() - 1) / 2 + 1 for x in LOGP])
    best = {j for j in range(30) if ties[j] <= 10}
    assert best <= set(by_effect[:12])
    assert row["shared"] == len(best & set(np.argsort(-SCORES)[:10].tolist()))
    assert (row["component"], row["n_parts"], row["n_prompts"]) == ("head", 30, 1)
    assert row["shared_by_chance"] == pytest.approx(100 / 30)


def test_an_answer_settles_at_the_layer_from_which_it_stays_first(by_hand: Database) -> None:
    found = by_hand.query("answer-by-layer").to_dicts()
    columns = ("category", "median_layer", "percent", "n_settled", "n_prompts")
    assert [tuple(row[c] for c in columns) for row in found] == [("language", 7, 80, 1, 2), ("capital", 0, 10, 1, 1)]


def test_the_story_of_a_prompt_is_told_in_the_models_order(by_hand: Database) -> None:
    found = by_hand.query("lens-story", prompt=0).to_dicts()
    assert [(row["layer"], row["place"]) for row in found][:4] == [
        *((0, "resid_pre"), (0, "resid_mid"), (0, "resid_post"), (1, "resid_mid")),
    ]
    assert len(found) == 21
    assert found[0]["tokens"] == '" a", "\\n"'
    assert [row["target_rank"] for row in found[:3]] == [7, 5, 9]

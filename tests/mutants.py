"""Deliberate faults, each with the tests that must notice it.

    python tests/mutants.py                  # all of them; about ten minutes on two cores
    python tests/mutants.py bounds stages    # those whose file or text has one of these words

Each mutant is one changed line in a copy of the package. It is caught if a test fails. A mutant that survives is a gap
in the tests, or code that does nothing: exits with 1 if fewer than 95 % are caught.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
LONGEST = 420.0
"""Seconds after which a mutant counts as caught: it never ends."""


@dataclass(frozen=True)
class Mutant:
    """``old`` stands once in the file and becomes ``new``; ``tests`` are arguments of pytest."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()} → {self.new.strip() or 'nothing'}"


PATCHING, GRADIENTS = "ingest/forward/patching.py", "ingest/forward/gradients.py"
EFFECTS = "ingest/attribution/effects.py"
READOUTS = "ingest/forward/readouts.py"
PROBES, SPLITS = "ingest/concept/probes.py", "ingest/concept/splits.py"
BOUNDS = "ingest/attribution/bounds.py"
CANDIDATES = "ingest/attribution/candidates.py"
LOGISTIC, METRICS = "ingest/concept/logistic.py", "ingest/concept/metrics.py"
RANKINGS, SCORES = "ingest/attribution/rankings.py", "ingest/attribution/scores.py"
MACROS, UNCERTAINTY, STAGED_RUN = "queries/macros.sql", "analysis/uncertainty.py", "warehouse/staged_run.py"
CURVES = "analysis/curves.py"
IMPORTS, INSPECTION = "warehouse/imports.py", "warehouse/inspection.py"
STAGES, WRITER = "ingest/stages.py", "ingest/execution/writer.py"
JOINING, WHOLE = "ingest/datasets/joining.py", "ingest/attribution/whole_answers.py"
KNOWLEDGE, CONCEPT = "ingest/attribution/study.py", "ingest/concept/study.py"
RUNS = "tests/test_knowledge_run.py"
OF_EXPERTS = "tests/test_experts.py"
PROVED = "tests/test_bounds.py tests/test_attribution.py"

MUTANTS = [
    # Neurons of experts
    Mutant(
        MACROS,
        "coalesce(expert_name(layer, expert), layer_name(component, layer))",
        "layer_name(component, layer)",
        OF_EXPERTS,
    ),
    Mutant(
        MACROS,
        "kind, component, layer, head, expert, neuron, sum",
        "kind, component, layer, head, min(expert) AS expert, neuron, sum",
        OF_EXPERTS,
    ),
    Mutant(MACROS, " AND named.expert IS NOT DISTINCT FROM wanted.expert", "", OF_EXPERTS),
    Mutant(MACROS, " AND scores.expert IS NOT DISTINCT FROM named.expert", "", OF_EXPERTS),
    Mutant(MACROS, "    AND query_neuron_scores.expert IS NOT DISTINCT FROM named.expert\n", "", OF_EXPERTS),
    Mutant(
        MACROS,
        "prompts_run, prompt_id, component, layer, head, expert, neuron",
        "prompts_run, prompt_id, component, layer, head, neuron",
        OF_EXPERTS,
    ),
    Mutant(
        MACROS,
        "coalesce(n_of_experts, n_layers::BIGINT * intermediate_size)",
        "n_layers::BIGINT * intermediate_size",
        OF_EXPERTS,
    ),
    Mutant(
        "queries/neuron_sums.sql",
        "head, expert, neuron, sum(score)",
        "head, min(expert) AS expert, neuron, sum(score)",
        OF_EXPERTS,
    ),
    Mutant(
        "queries/exact_sums.sql",
        "head, expert, neuron, NULL AS total",
        "head, min(expert) AS expert, neuron, NULL AS total",
        OF_EXPERTS,
    ),
    Mutant(
        "queries/knowledge/neuron-tokens.sql",
        " AND neuron_tokens.expert IS NOT DISTINCT FROM named.expert",
        "",
        OF_EXPERTS,
    ),
    Mutant(
        "ingest/forward/layout.py",
        "layouts[i].experts(neuron[here]), layouts[i].neurons(neuron[here])",
        "layouts[i].experts(neuron[here]), neuron[here]",
        "tests/test_expert_run.py",
    ),
    Mutant(
        "ingest/attribution/score_rows.py",
        "chosen.sum(1, keepdim=True) + NEXT_EXPERTS",
        "NEXT_EXPERTS",
        "tests/test_expert_run.py",
    ),
    # Files
    Mutant("warehouse/files.py", "        sync(partial)\n", "", "tests/test_lake.py"),
    # The probe's solver
    Mutant(LOGISTIC, "return 2 * radius * float(", "return radius * float(", "tests/test_probes.py"),
    Mutant(LOGISTIC, "penalty[-1] = 0.0", "penalty[-1] = 1.0", "tests/test_probes.py"),
    Mutant(LOGISTIC, "return self.slack <= TOLERANCE", "return True", "tests/test_probes.py"),
    Mutant(LOGISTIC, "gradient = penalty * w + A.T @ (p - y)", "gradient = A.T @ (p - y)", "tests/test_probes.py"),
    Mutant(LOGISTIC, "w[-1] * design.radius - design.mean @ coef", "w[-1] * design.radius", "tests/test_probes.py"),
    Mutant(SPLITS, "PAPER_SEED = 42", "PAPER_SEED = 43", "tests/test_probes.py"),
    Mutant(SPLITS, "TEST_SHARE = 0.4", "TEST_SHARE = 0.5", "tests/test_probes.py"),
    Mutant(
        PROBES,
        "return _Reading(decision > 0, decision, fit.converged, fit.n_iter, fit.coef, fit.intercept)",
        "return _Reading(decision > 1, decision, fit.converged, fit.n_iter, fit.coef, fit.intercept)",
        "tests/test_probes.py",
    ),
    Mutant(LOGISTIC, "if overfits and np.mean(", "if overfits or np.mean(", "tests/test_probes.py"),
    Mutant(LOGISTIC, "< _TOLD_APART:", "< 10:", "tests/test_probes.py"),
    Mutant(PROBES, "if not np.isfinite(X).all():", "if False:", "tests/test_probes.py"),
    Mutant(SPLITS, "0 < labels[rows].mean() < 1 for rows", "labels[rows].mean() <= 1 for rows", "tests/test_probes.py"),
    Mutant(SPLITS, "% 2)[group_of]", "% 2)[np.arange(len(group_of)) % len(names)]", "tests/test_probes.py"),
    Mutant(SPLITS, "np.argsort(y != first_label, kind", "np.argsort(y, kind", "tests/test_probes.py"),
    Mutant(PROBES, "read(labels[split.train], reading.c)", "read(labels[split.train], None)", "tests/test_probes.py"),
    Mutant(PROBES, "score.f1_of_0 if task.first_label == 1 else score.f1", "score.f1", "tests/test_probes.py"),
    Mutant(LOGISTIC, "self.rows /= self.scale or 1.0", "pass", "tests/test_probes.py"),
    Mutant(LOGISTIC, "np.flatnonzero(~held_out)", "np.arange(len(held_out))", "tests/test_probes.py"),
    Mutant(LOGISTIC, "least = int(np.argmin(walked))", "least = int(np.argmax(walked))", "tests/test_probes.py"),
    Mutant(
        METRICS, "wilson_interval(share, n / max(effect, 1.0))", "wilson_interval(share, n)", "tests/test_probes.py"
    ),
    Mutant(METRICS, "(ranks[y] - rankdata(values[y])) / n_zero", "ranks[y] / n_zero", "tests/test_probes.py"),
    # The proof
    Mutant(BOUNDS, "least = (known - error).topk(k", "least = known.topk(k", PROVED),
    Mutant(BOUNDS, "bound = upper + slack", "bound = upper - slack", PROVED),
    Mutant(BOUNDS, "open_ = (bound > least) & ~scored", "open_ = (upper - 0.02 > least) & ~scored", PROVED),
    Mutant(BOUNDS, "closer(rows, columns) + slack[open_])", "closer(rows, columns) - slack[open_])", PROVED),
    Mutant(BOUNDS, "math.sqrt(4 * _TILE)) * self.scale.abs()", "math.sqrt(4 * _TILE)) * 0 * self.scale", PROVED),
    Mutant(BOUNDS, "score, share = -total.log1p(), 1 + total", "score, share = -total, 1 + total", PROVED),
    Mutant(BOUNDS, "            length += weighted @ self._lengths[tile]\n", "", PROVED),
    Mutant(BOUNDS, "length[some] = tilted @ self._lengths.double()", "length[some] = self._lengths.min()", PROVED),
    Mutant(BOUNDS, "* size / share, length / share", "* size / share, length", PROVED),
    Mutant(BOUNDS, "        logits -= logits.amax(1, keepdim=True)", "        logits -= 0 ", PROVED),
    Mutant(BOUNDS, "p[rows] = (logits / total).float()", "p[rows] = logits", PROVED),
    Mutant(BOUNDS, "far = (~((total > -0.99)", "far = (~((total > -9e9)", PROVED),
    Mutant(BOUNDS, "(b.expm1() - b) / b.square())", "(b.expm1() - b) / (4 * b.square()))", PROVED),
    Mutant(BOUNDS, "most = explicit + rest - first + largest", "most = explicit + rest - first + 0 * largest", PROVED),
    Mutant(BOUNDS, "rest_mean = -first / rest", "rest_mean = first / rest", PROVED),
    Mutant(BOUNDS, "index = torch.where(best.values > -torch.inf, best.indices, -1)", "index = best.indices", PROVED),
    Mutant(BOUNDS, "gap = reach.square() / 8", "gap = reach.square() / 80", PROVED),
    Mutant(BOUNDS, "torch.where(scored, known + error", "torch.where(scored, known - 2", PROVED),
    Mutant(CANDIDATES, "~(most <= reached.get(key, -np.inf))", "most > np.inf", RUNS),
    # Scores and rankings
    Mutant(SCORES, "return (first + place[layer]) * self", "return place[layer] * self", PROVED),
    Mutant(
        SCORES,
        "in self.decomposition.blocks[layer].before(component)",
        'in ({"ffn": ["attn"]}.get(component, []))',
        PROVED,
    ),
    Mutant(SCORES, "return torch.where(logits == 0, 1.0, slope)", "return torch.ones_like(slope)", PROVED),
    Mutant(SCORES, "upper.append(factor * (at.slope[rows]", "upper.append(0.9 * factor * (at.slope[rows]", PROVED),
    Mutant(RANKINGS, "-tie[near].cpu().numpy(), -row", "tie[near].cpu().numpy(), -row", "tests/test_attribution.py"),
    Mutant(RANKINGS, "return 1e-5 * column_length", "return -1e-1 * column_length", "tests/test_attribution.py"),
    Mutant(
        RANKINGS,
        "rank[rows] += (logits > own).sum(1)",
        "rank[rows] += (logits >= own).sum(1)",
        "tests/test_attribution.py",
    ),
    Mutant(RANKINGS, "return (1 + torch.cat(counts", "return (2 + torch.cat(counts", "tests/test_attribution.py"),
    Mutant(SCORES, "1.0).clamp(max=1).amin(1)", "1.0).clamp(max=1).amax(1)", "tests/test_attribution.py"),
    Mutant("ingest/attribution/score_rows.py", "logits[:, missing] = never", "pass", "tests/test_attribution.py"),
    Mutant("ingest/models/structure.py", "return plain and not", "return False and not", "tests/test_attribution.py"),
    # The knowledge study
    Mutant(JOINING, 'return " " if takes_space(prompt, answer)', 'return " " if True', "tests/test_joining.py"),
    Mutant(JOINING, "return _closes(prompt.rstrip())", "return True", "tests/test_joining.py"),
    Mutant(WHOLE, "if total >= logp[i]}", "if total > 0}", "tests/test_whole_answers.py"),
    Mutant(WHOLE, "and most >= logp[i]}", "and most >= 0}", "tests/test_whole_answers.py"),
    Mutant(KNOWLEDGE, "target.is_shared and not whole", "False", "tests/test_whole_answers.py"),
    Mutant(KNOWLEDGE, "KEPT_RANK = 10", "KEPT_RANK = 11", "tests/test_stages.py"),
    Mutant(
        KNOWLEDGE,
        'return None if ahead else "beaten_by_another_answer"',
        "return None",
        "tests/test_stages.py",
    ),
    Mutant(
        KNOWLEDGE,
        "k, layouts = max(wanted.top_k, wanted.query_values",
        "k, layouts = max(1, wanted.query_values",
        "tests/test_knowledge_run.py",
    ),
    Mutant(
        "ingest/attribution/targets.py",
        "for ids in self.others} - {self.first}",
        "for ids in self.others}",
        "tests/test_knowledge_run.py",
    ),
    Mutant("ingest/forward/ablation.py", "rank = 1 + (logits > own).sum(1)", "rank = (logits > own).sum(1)", PROVED),
    Mutant("ingest/forward/ablation.py", "states[row, :, entry] = 0", "states[row, :, entry] *= 0.5", PROVED),
    # Capture
    Mutant(
        "ingest/forward/checks.py",
        'STATES_TOLERANCE = TOLERANCE | {"bfloat16": 0.3',
        'STATES_TOLERANCE = TOLERANCE | {"bfloat16": 1.0',
        "tests/test_stages.py",
    ),
    Mutant("ingest/forward/checks.py", "if not value <= tolerance:", "if value > tolerance:", "tests/test_capture.py"),
    Mutant(
        "ingest/forward/capture.py",
        "while stop < limit and length_class(lengths[stop]) == same:",
        "while stop < limit:",
        "tests/test_length_classes.py",
    ),
    Mutant("ingest/forward/memory.py", "SHARE = 0.4", "SHARE = 0.9", "tests/test_stages.py"),
    Mutant("ingest/models/tokens.py", "ids[: len(ids) - after]", "ids[: len(ids)]", "tests/test_tokens.py"),
    Mutant(
        "ingest/models/tokens.py",
        "twice = 0 < before < len(ids)",
        "twice = 1 < before < len(ids)",
        "tests/test_tokens.py",
    ),
    # The runner
    Mutant(
        STAGES,
        "return self.staged.has(stage.tables[-1], shard.name)",
        "return self.staged.has(stage.tables[0], shard.name)",
        "tests/test_stages.py",
    ),
    Mutant(STAGES, 'if staged.facts.get("layout") != LAYOUT:', "if False:", "tests/test_stages.py"),
    Mutant(STAGES, "if name not in self.staged.facts:", "if True:", "tests/test_stages.py"),
    Mutant(WRITER, "or (rows.table == last and any(of == name for of, _ in pending))", "", "tests/test_stages.py"),
    Mutant(WRITER, "            written.result()\n", "            pass\n", "tests/test_stages.py"),
    Mutant(
        CONCEPT,
        "if len(parts[-1]) == size or (parts[-1] and tokens",
        "if len(parts[-1]) == size or (tokens",
        "tests/test_stages.py",
    ),
    Mutant(CONCEPT, "tokens + n_tokens[prompt] > most", "tokens > most", "tests/test_stages.py"),
    # Costs
    Mutant(
        "ingest/cost.py",
        "ATTRIBUTING: flops / rate",
        "ATTRIBUTING: 10 * flops / rate",
        "tests/test_cost.py",
    ),
    Mutant("ingest/cost.py", "_NEURON_BYTES = 80", "_NEURON_BYTES = 800", "tests/test_cost.py"),
    # SQL
    Mutant(
        MACROS,
        "round(variation_rate, 12) >= jump_ratio;",
        "round(variation_rate, 12) > jump_ratio;",
        "tests/test_queries.py",
    ),
    Mutant(
        MACROS,
        "round(abs(variation_rate - 1), 12) < tolerance;",
        "round(abs(variation_rate - 1), 12) <= tolerance;",
        "tests/test_queries.py",
    ),
    Mutant(MACROS, "max(layer) FILTER (has_converged", "min(layer) FILTER (has_converged", "tests/test_queries.py"),
    Mutant(
        MACROS, "CASE WHEN lag(layer) OVER by_layer = layer - 1 THEN", "CASE WHEN true THEN", "tests/test_queries.py"
    ),
    Mutant(
        MACROS,
        "prompts.run = prompts_run\n    WHERE kept AND",
        "prompts.run = prompts_run\n    WHERE",
        "tests/test_knowledge_queries.py",
    ),
    Mutant(PATCHING, "new[row, at[row], which]", "new[row, :, which]", "tests/test_patching.py"),
    Mutant(
        GRADIENTS,
        "hooks.enter_context(dense.module.register_forward_pre_hook(_halved))",
        "pass",
        "tests/test_patching.py",
    ),
    Mutant(GRADIENTS, "frozen=True", "frozen=False", "tests/test_patching.py"),
    Mutant(EFFECTS, "if j > i), others[0])", "if j > i), others[-1])", "tests/test_effects.py"),
    Mutant(EFFECTS, "(own, own - new) if case", "(own, new - own) if case", "tests/test_effects.py"),
    Mutant(
        "ingest/attribution/lens.py",
        'yield (layer, "resid_post"), after',
        'yield (layer, "resid_post"), before',
        "tests/test_effects.py",
    ),
    Mutant(
        READOUTS,
        "seen[layer, component] * blocks[layer].additions.multipliers[component]",
        "seen[layer, component]",
        "tests/test_lens.py",
    ),
    Mutant(
        READOUTS, '(layer - 1, "resid_post") if layer else', '(layer, "resid_post") if layer else', "tests/test_lens.py"
    ),
    Mutant(
        MACROS, "CASE lens WHEN 'logit' THEN prompt_id END, CASE", "prompt_id, position, CASE", "tests/test_lens.py"
    ),
    Mutant("ingest/forward/tuned_lens.py", "self.kl_tuned.mean() <=", "0 <=", "tests/test_lens.py"),
    Mutant("ingest/forward/lens_training.py", " - self.mean @ weight.T", "", "tests/test_lens.py"),
    Mutant("ingest/concept/read_vectors.py", "tokens[1 - label]", "tokens[0]", "tests/test_lens.py"),
    Mutant("ingest/attribution/read_prompts.py", "if translators is None or p > 0", "if p >= 0", "tests/test_lens.py"),
    Mutant(
        "queries/knowledge/answer-by-layer.sql",
        "FILTER (target_rank > 1)",
        "FILTER (target_rank = 1)",
        "tests/test_effects.py",
    ),
    Mutant(
        MACROS,
        "ORDER BY standing, since DESC NULLS LAST, run DESC\n    ) = 1\n)\n\nSELECT\n    newest.",
        "ORDER BY standing, since, run DESC\n    ) = 1\n)\n\nSELECT\n    newest.",
        "tests/test_effects.py",
    ),
    Mutant(MACROS, "        ELSE dataset END;", "        ELSE 'all' END;", "tests/test_knowledge_queries.py"),
    Mutant(
        MACROS,
        "PARTITION BY model, shown_dataset, category) AS n_kept",
        "PARTITION BY model, category) AS n_kept",
        "tests/test_knowledge_queries.py",
    ),
    Mutant(
        MACROS,
        "dense_rank() OVER (ORDER BY model, shown_dataset, category)",
        "dense_rank() OVER (ORDER BY model, category)",
        "tests/test_knowledge_queries.py",
    ),
    Mutant(
        MACROS, "AS a * b / nullif(n, 0)::DOUBLE;", "AS a / nullif(n, 0)::DOUBLE;", "tests/test_knowledge_queries.py"
    ),
    Mutant(
        MACROS, "range(greatest(0, a + b - n), least(a, b) + 1),", "range(0, a),", "tests/test_knowledge_queries.py"
    ),
    Mutant(MACROS, "len(a) + len(b) - n_shared(a, b))", "len(a) + len(b))", "tests/test_knowledge_queries.py"),
    Mutant(MACROS, "WHEN preferred THEN 1 ELSE 3 END", "WHEN preferred THEN 3 ELSE 1 END", "tests/test_current.py"),
    Mutant(MACROS, "least(finished_at, imported_at) AS since", "finished_at AS since", "tests/test_current.py"),
    # Statistics
    Mutant(UNCERTAINTY, "_LEVEL = (0.025, 0.975)", "_LEVEL = (0.05, 0.95)", "tests/test_uncertainty.py"),
    Mutant(UNCERTAINTY, "np.stack([1 + (resampled >", "np.stack([0 + (resampled >", "tests/test_uncertainty.py"),
    Mutant(UNCERTAINTY, "return min(1.0, 2 * float(", "return min(1.0, float(", "tests/test_uncertainty.py"),
    Mutant(UNCERTAINTY, "rng.integers(n, size=n)", "rng.permutation(n)", "tests/test_uncertainty.py"),
    Mutant(UNCERTAINTY, "MIN_PROMPTS = 5", "MIN_PROMPTS = 4", "tests/test_uncertainty.py"),
    Mutant(UNCERTAINTY, "np.sum(flipped >= largest)", "np.sum(flipped > largest)", "tests/test_uncertainty.py"),
    Mutant(CURVES, "if p_value < SURE:", "if curve.max() > level:", "tests/test_uncertainty.py"),
    Mutant(CURVES, "if none > 0.5 or", "if none > 1 or", "tests/test_uncertainty.py"),
    Mutant(
        MACROS,
        "CASE WHEN beats_baseline(best_accuracy, baseline_accuracy, n_test)",
        "CASE WHEN true",
        "tests/test_queries.py",
    ),
    Mutant(MACROS, "WHEN 'default' THEN 'logistic-raw'", "WHEN 'default' THEN 'logistic'", "tests/test_queries.py"),
    # The warehouse
    Mutant(
        STAGED_RUN,
        'raise AssertionError(f"the run id {run} does not follow from its identity")',
        "pass",
        "tests/test_lake.py tests/test_manifest.py",
    ),
    Mutant(INSPECTION, "if file.size != record.bytes:", "if False:", "tests/test_inspection.py"),
    Mutant(
        "warehouse/checksums.py",
        'for what in ("bytes", "rows", "sha256"):',
        'for what in ("bytes", "rows"):',
        "tests/test_inspection.py",
    ),
    Mutant(INSPECTION, "or entry[:2] != [light, heavy]:", "or entry[0] != light:", "tests/test_inspection.py"),
    Mutant(IMPORTS, "if n_places != (n_rows,):", "if False:", "tests/test_manifest.py"),
    Mutant(IMPORTS, "            _check_id(copy, manifest, row)\n", "", "tests/test_manifest.py tests/test_schemas.py"),
    Mutant(IMPORTS, "not 0 <= first <= last < n_layers:", "not 0 <= first <= last:", "tests/test_manifest.py"),
    Mutant(
        "warehouse/compaction.py", "if record.rows != before and not sampled:", "if False:", "tests/test_manifest.py"
    ),
    Mutant("warehouse/paging.py", "if list(names) != list(order) or", "if", "tests/test_serve.py"),
    Mutant(
        "warehouse/statements.py", 'if kinds[0] not in ("SELECT", "EXPLAIN"):', "if False:", "tests/test_hostile.py"
    ),
]


def caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails on a copy of the package with the mutant, and what pytest said last."""
    with tempfile.TemporaryDirectory(prefix="kdb-mutant-") as folder:
        copy = Path(folder) / "kdb"
        shutil.copytree(REPOSITORY / "kdb", copy)
        for room in ("ingest", "analysis", "queries", "warehouse"):
            shutil.copytree(REPOSITORY / room, copy / room)
        part = mutant.file.removeprefix("kdb/")
        text = (copy / part).read_text()
        if text.count(mutant.old) != 1:
            return False, f"stands there {text.count(mutant.old)} times: change the list"
        (copy / part).write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            return True, "never ended"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, lines[0] if lines else done.stdout.strip()[-200:]


def main(words: Sequence[str]) -> None:
    """Try the mutants, and print a line for each."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in str(mutant) for word in words)]
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (noticed, said) in zip(chosen, pool.map(caught, chosen), strict=True):
            print(f"{'caught  ' if noticed else 'SURVIVED'} {mutant}\n         {said}", flush=True)
            survivors += [] if noticed else [mutant]
    share = 1 - len(survivors) / max(1, len(chosen))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught: {share:.0%}")
    sys.exit(share < 0.95)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Preflight: prove on the real model and the real data that a run is not silently wrong.

In: our model, a few real documents, and the logits of the stock transformers model on them. Out: a
CheckResult per check. A check that fails stops the run with GateError before the first step.

CHECKS is the table of all. Many name a fault (a leaking mask, labels shifted by one, a lost
target): the check then also runs with the fault injected and must refuse it, since a check that
cannot fail proves nothing. Every result says how many items it compared; a check of nothing, and a
fault that cannot be injected, are warnings. Left out: choosing the documents
(session/preflight_probe.py). No weight changes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.core.errors import GateError
from tunesmith.core.events import CheckResult
from tunesmith.core.hardware import release_memory
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.session.preflight_probe import REPORT_FIX, PreflightSamples, Subject
from tunesmith.train import preflight_blocks as blocks
from tunesmith.train import preflight_forward as forward
from tunesmith.train import preflight_tokens as tokens


@dataclass(frozen=True)
class Check:
    """A check, which runs where it `applies`, and the fault that it must refuse.

    `why_impossible` returns why the fault cannot be injected, empty if it can."""

    run: Callable[[Subject], CheckResult]
    fault: str = ""
    corrupt: Callable[[Subject], Subject] = lambda subject: subject
    why_impossible: Callable[[Subject], str] = lambda _: ""
    applies: Callable[[Subject], bool] = lambda _: True


def run_preflight(model: PackedCausalLM, samples: PreflightSamples) -> list[CheckResult]:
    """Run all checks in order, then their faults; raise GateError for the first that fails."""
    model.network.eval()
    subject = Subject(model, samples)
    checks = [check for check in CHECKS if check.applies(subject)]
    with torch.no_grad():
        results = [check.run(subject) for check in checks]
        results.append(_inject_faults([check for check in checks if check.fault], subject))
    release_memory()  # of its networks in fp32; the steps need blocks of other sizes
    return results


def _inject_faults(checks: Sequence[Check], subject: Subject) -> CheckResult:
    """Check that each fault that can be injected is detected."""
    detected: list[str] = []
    skipped: list[str] = []
    for check in checks:
        if reason := check.why_impossible(subject):
            skipped.append(f"{check.fault} ({reason})")
            continue
        corrupted = check.corrupt(subject)
        try:
            check.run(corrupted)
        except GateError:
            detected.append(check.fault)
            continue
        raise GateError(
            f"preflight did not detect an injected fault ({check.fault}), so it proves nothing",
            where="preflight",
            fix=REPORT_FIX,
        )
    kind = "negative controls"
    if not skipped:
        evidence = f"all {len(detected)} injected faults detected: {', '.join(detected)}"
        return CheckResult.from_items(kind, len(detected), evidence, if_none="there is no fault")
    counts = f"{len(detected)} of {len(detected) + len(skipped)} injected faults detected"
    evidence = f"{counts}: {', '.join(detected)}; not injected: {', '.join(skipped)}"
    return CheckResult(kind, "warn", evidence, num_checked=len(detected))


def _has_rows(subject: Subject) -> bool:
    return subject.samples.texts is None


def _has_texts(subject: Subject) -> bool:
    return subject.samples.texts is not None


CHECKS = (
    Check(tokens.check_supervised_tokens),
    Check(
        forward.check_oracle,
        "cache that loses a token",
        forward.break_oracle,
        forward.explain_unbreakable,
    ),
    Check(forward.check_logits),
    Check(
        forward.check_labels,
        "shifted labels",
        forward.shift_labels,
        forward.explain_invisible_shift,
    ),
    Check(forward.check_document_isolation, "leaking mask", forward.leak_mask),
    Check(forward.check_packed_loss),
    Check(
        forward.check_rotation,
        "pack rotated as one document",
        forward.leak_mask,
        forward.explain_equal_rotation,
        applies=forward.has_rotary,
    ),
    Check(
        tokens.check_eos_supervised,
        "another end token",
        tokens.swap_end,
        tokens.explain_short_answers,
        applies=_has_rows,
    ),
    Check(tokens.check_token_ids, applies=_has_rows),
    Check(tokens.check_text_eos, applies=_has_texts),
    Check(
        tokens.check_window_coverage,
        "lost target",
        tokens.drop_target,
        tokens.explain_missing_text,
        applies=_has_texts,
    ),
    Check(
        tokens.check_role_masks,
        "targets where none are trained",
        tokens.swap_role_masks,
        tokens.explain_equal_masks,
        applies=lambda subject: subject.samples.role_masks is not None,
    ),
    Check(
        forward.check_prefix_sharing,
        "branch that attends to its sibling",
        forward.leak_sibling,
        forward.explain_missing_siblings,
        applies=lambda subject: subject.samples.sharing_documents is not None,
    ),
    Check(
        blocks.check_blocks,
        "block that reads another document",
        forward.leak_mask,
        blocks.explain_missing_modules,
    ),
    Check(blocks.check_gradients),
    Check(forward.describe_quantized_weights, applies=forward.has_quantized_weights),
)

"""Rules for whatever is needed: prompts first, what there is to train on, what is worth knowing.
See rubric.py."""

from __future__ import annotations

from tunesmith.advise.rules.questionnaire import NEEDS, Need, Requirements
from tunesmith.advise.rules.reason import MIN_EXAMPLES, MIN_PAIRS, TRAINING_APPROACHES, RuleResult

# ---------------------------------------------------------------- prompts first


def recommend_good_prompt(requirements: Requirements) -> RuleResult | None:
    """A prompt that does well leaves nothing to gain; costs are another need
    (`recommend_prompt_distillation`)."""
    if requirements.prompt != "good":
        return None
    explanation = "the prompt does well: anything else could add little but its cost, and a model to look after"
    needs: tuple[Need, ...] = tuple(need for need in NEEDS if need != "latency")
    return RuleResult(
        "recommend_good_prompt",
        needs,
        explanation,
        "",
        "ours",
        recommended=("prompt",),
        ruled_out=TRAINING_APPROACHES,
    )


def reject_needless_retrieval(requirements: Requirements) -> RuleResult | None:
    """A prompt that does well without looking anything up needs no index."""
    if requirements.prompt != "good":
        return None
    explanation = "the prompt does well without looking anything up"
    return RuleResult(
        "reject_needless_retrieval",
        ("facts", "domain"),
        explanation,
        "",
        "ours",
        ruled_out=("retrieval",),
    )


def recommend_trying_prompts(requirements: Requirements) -> RuleResult | None:
    """Sclar 2023 (2310.11324): the format of a prompt alone moves accuracy by 7.5 points in the
    median, by up to 76."""
    if requirements.prompt not in (None, "untried"):
        return None
    explanation = "no prompt has been tried: an afternoon tells, and its score is what training has to beat. Try several: "
    explanation += (
        "the format of a prompt alone moves accuracy by 7.5 points in the median, by up to 76"
    )
    return RuleResult(
        "recommend_trying_prompts",
        ("format", "tone", "skill"),
        explanation,
        "Sclar 2023",
        "published",
        recommended=("prompt",),
    )


def reject_untested_training(requirements: Requirements) -> RuleResult | None:
    """Mosbach 2023 (2305.16938): at one model size, fine-tuning and examples in the prompt
    generalise alike, both with a large spread. Tone is left out: there training is known to win
    (`recommend_sft_for_tone`)."""
    if requirements.prompt not in (None, "untried"):
        return None
    explanation = "it may not be needed: at one model size, examples in the prompt and fine-tuning generalise alike"
    return RuleResult(
        "reject_untested_training",
        ("format", "skill"),
        explanation,
        "Mosbach 2023",
        "published",
        ruled_out=("sft", "preference"),
    )


def recommend_few_shot(requirements: Requirements) -> RuleResult | None:
    """Fewer examples than are trained on can be shown in the prompt, all or the nearest ones."""
    if not 0 < (requirements.examples or 0) < MIN_EXAMPLES or requirements.prompt == "good":
        return None
    explanation = f"{requirements.examples} examples fit into the prompt: all of them, or the ones most like the question"
    return RuleResult(
        "recommend_few_shot",
        ("format", "tone", "skill"),
        explanation,
        "",
        "ours",
        recommended=("prompt",),
    )


# ---------------------------------------------------------------- what there is to train on


def reject_few_examples(requirements: Requirements) -> RuleResult | None:
    """OpenAI's fine-tuning guide as of 2024 (from memory, unverified): clear improvements usually
    come with 50 to 100 examples."""
    if (requirements.examples or 0) >= MIN_EXAMPLES:
        return None
    count_text = (
        f"{requirements.examples} examples" if requirements.examples else "no examples are named"
    )
    explanation = (
        f"{count_text}: gains are clear from 50 to 100 on, and some are needed to measure with"
    )
    needs: tuple[Need, ...] = tuple(
        need for need in NEEDS if need != "facts"
    )  # those have a rule of their own
    source = "OpenAI's fine-tuning guide, unverified"
    return RuleResult(
        "reject_few_examples", needs, explanation, source, "published", ruled_out=("sft",)
    )


def recommend_preference_training(requirements: Requirements) -> RuleResult | None:
    """Rafailov 2023 (2305.18290), and Castricato 2024 (2402.07896): told not to, a 7B model still
    spoke of the forbidden thing (.33 -> .36); trained on pairs, a 13B did as well as GPT-4. The
    least number is ours."""
    if (requirements.pairs or 0) < MIN_PAIRS:
        return None
    explanation = f"{requirements.pairs:,} pairs say what not to do, which small models cannot be told: asked to avoid a thing, a 7B "
    explanation += "model named it in 36% of answers instead of 33%. Comes after SFT, or on a model that follows instructions"
    return RuleResult(
        "recommend_preference_training",
        ("tone", "skill"),
        explanation,
        "Rafailov 2023, Castricato 2024",
        "published",
        recommended=("preference",),
    )


def reject_few_pairs(requirements: Requirements) -> RuleResult | None:
    """Published runs have thousands of pairs; below some hundreds the better answers alone serve as
    SFT rows."""
    if requirements.pairs is None or requirements.pairs >= MIN_PAIRS:
        return None
    explanation = f"{requirements.pairs} pairs; published runs have thousands. The better answers alone are rows for SFT"
    return RuleResult(
        "reject_few_pairs", ("tone", "skill"), explanation, "", "ours", ruled_out=("preference",)
    )


# ---------------------------------------------------------------- worth knowing


def suggest_raft_training(requirements: Requirements) -> RuleResult | None:
    """RAFT, Zhang 2024 (2403.10131): a model tuned on a domain and then given documents fell from
    61.1 to 42.6 on one set; trained with documents in the prompt, right and wrong ones, it did
    not."""
    if "facts" not in requirements.need or len(requirements.need) == 1:
        return None
    explanation = "if both are done, train with the retrieved documents in the prompt, wrong ones among them: a model tuned "
    explanation += "without them got worse at reading them (61.1 to 42.6)"
    return RuleResult(
        "suggest_raft_training",
        NEEDS,
        explanation,
        "Zhang 2024 (RAFT)",
        "published",
        concerns=("retrieval", "sft"),
    )


def warn_small_model_prompting(requirements: Requirements) -> RuleResult | None:
    """Mosbach 2023: learning from examples in the prompt needs a large model, fine-tuning works on
    small ones."""
    if not requirements.private:
        return None
    explanation = "if it has to be a small model of your own: those follow prompts badly, and fine-tuning works on them"
    return RuleResult(
        "warn_small_model_prompting",
        ("format", "tone", "skill"),
        explanation,
        "Mosbach 2023",
        "published",
        concerns=("prompt",),
    )


def warn_training_data_extraction(requirements: Requirements) -> RuleResult | None:
    """Carlini 2021 again (unverified): a model is as secret as the text that it was trained on."""
    if not requirements.private:
        return None
    explanation = (
        "keep the trained model as secret as its text, which can be pulled out of it word for word"
    )
    source = "Carlini 2021, unverified"
    return RuleResult(
        "warn_training_data_extraction",
        NEEDS,
        explanation,
        source,
        "published",
        concerns=TRAINING_APPROACHES,
    )


def warn_safety_loss(_: Requirements) -> RuleResult | None:
    """Qi 2023 (2310.03693): harmless rows raised a chat model's harmful answers from .3% to 16.1%,
    with LoRA 25.2%."""
    explanation = "harmless rows raised the harmful answers of a chat model from 0.3% to 16%, with LoRA to 25%: ask it such "
    explanation += "questions before and after"
    return RuleResult(
        "warn_safety_loss", NEEDS, explanation, "Qi 2023", "published", concerns=("sft",)
    )

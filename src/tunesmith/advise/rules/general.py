"""Rules for whatever is needed: prompts first, what there is to train on, what is worth knowing. See rubric.py."""

from __future__ import annotations

from tunesmith.advise.rules.questionnaire import NEEDS, Need, Situation
from tunesmith.advise.rules.reason import LEAST_EXAMPLES, LEAST_PAIRS, TRAINING, Reason

# ---------------------------------------------------------------- prompts first


def prompt_is_enough(facts: Situation) -> Reason | None:
    """A prompt that does well leaves nothing to gain; costs are another need (`shorter_prompt`)."""
    if facts.prompt != "good":
        return None
    why = "the prompt does well: anything else could add little but its cost, and a model to look after"
    needs: tuple[Need, ...] = tuple(need for need in NEEDS if need != "latency")
    return Reason("prompt_is_enough", needs, why, "", "ours", helps=("prompt",), rules_out=TRAINING)


def prompt_has_the_facts(facts: Situation) -> Reason | None:
    """A prompt that does well without looking anything up needs no index."""
    if facts.prompt != "good":
        return None
    why = "the prompt does well without looking anything up"
    return Reason("prompt_has_the_facts", ("facts", "domain"), why, "", "ours", rules_out=("retrieval",))


def try_a_prompt(facts: Situation) -> Reason | None:
    """Sclar 2023 (2310.11324): the format of a prompt alone moves accuracy by 7.5 points in the median, by up to 76."""
    if facts.prompt not in (None, "untried"):
        return None
    why = "no prompt has been tried: an afternoon tells, and its score is what training has to beat. Try several: "
    why += "the format of a prompt alone moves accuracy by 7.5 points in the median, by up to 76"
    return Reason("try_a_prompt", ("format", "tone", "skill"), why, "Sclar 2023", "published", helps=("prompt",))


def untried_prompt(facts: Situation) -> Reason | None:
    """Mosbach 2023 (2305.16938): at one model size, fine-tuning and examples in the prompt generalise alike, both with
    a large spread. Tone is left out: there training is known to win (`tone_trained`)."""
    if facts.prompt not in (None, "untried"):
        return None
    why = "it may not be needed: at one model size, examples in the prompt and fine-tuning generalise alike"
    return Reason(
        "untried_prompt", ("format", "skill"), why, "Mosbach 2023", "published", rules_out=("sft", "preference")
    )


def few_examples_go_in_the_prompt(facts: Situation) -> Reason | None:
    """Fewer examples than are trained on can be shown in the prompt, all or the nearest ones."""
    if not 0 < (facts.examples or 0) < LEAST_EXAMPLES or facts.prompt == "good":
        return None
    why = f"{facts.examples} examples fit into the prompt: all of them, or the ones most like the question"
    return Reason("few_examples_go_in_the_prompt", ("format", "tone", "skill"), why, "", "ours", helps=("prompt",))


# ---------------------------------------------------------------- what there is to train on


def too_few_examples(facts: Situation) -> Reason | None:
    """OpenAI's fine-tuning guide as of 2024 (from memory, unverified): clear improvements usually come with 50 to 100
    examples."""
    if (facts.examples or 0) >= LEAST_EXAMPLES:
        return None
    count = f"{facts.examples} examples" if facts.examples else "no examples are named"
    why = f"{count}: gains are clear from 50 to 100 on, and some are needed to measure with"
    needs: tuple[Need, ...] = tuple(need for need in NEEDS if need != "facts")  # those have a rule of their own
    source = "OpenAI's fine-tuning guide, unverified"
    return Reason("too_few_examples", needs, why, source, "published", rules_out=("sft",))


def pairs_rank_answers(facts: Situation) -> Reason | None:
    """Rafailov 2023 (2305.18290), and Castricato 2024 (2402.07896): told not to, a 7B model still spoke of the
    forbidden thing (.33 -> .36); trained on pairs, a 13B did as well as GPT-4. The least number is ours."""
    if (facts.pairs or 0) < LEAST_PAIRS:
        return None
    why = f"{facts.pairs:,} pairs say what not to do, which small models cannot be told: asked to avoid a thing, a 7B "
    why += "model named it in 36% of answers instead of 33%. Comes after SFT, or on a model that follows instructions"
    return Reason(
        "pairs_rank_answers",
        ("tone", "skill"),
        why,
        "Rafailov 2023, Castricato 2024",
        "published",
        helps=("preference",),
    )


def too_few_pairs(facts: Situation) -> Reason | None:
    """Published runs have thousands of pairs; below some hundreds the better answers alone serve as SFT rows."""
    if facts.pairs is None or facts.pairs >= LEAST_PAIRS:
        return None
    why = f"{facts.pairs} pairs; published runs have thousands. The better answers alone are rows for SFT"
    return Reason("too_few_pairs", ("tone", "skill"), why, "", "ours", rules_out=("preference",))


# ---------------------------------------------------------------- worth knowing


def trained_with_retrieval(facts: Situation) -> Reason | None:
    """RAFT, Zhang 2024 (2403.10131): a model tuned on a domain and then given documents fell from 61.1 to 42.6 on one
    set; trained with documents in the prompt, right and wrong ones, it did not."""
    if "facts" not in facts.need or len(facts.need) == 1:
        return None
    why = "if both are done, train with the retrieved documents in the prompt, wrong ones among them: a model tuned "
    why += "without them got worse at reading them (61.1 to 42.6)"
    return Reason("trained_with_retrieval", NEEDS, why, "Zhang 2024 (RAFT)", "published", concerns=("retrieval", "sft"))


def small_models_are_prompted_badly(facts: Situation) -> Reason | None:
    """Mosbach 2023: learning from examples in the prompt needs a large model, fine-tuning works on small ones."""
    if not facts.private:
        return None
    why = "if it has to be a small model of your own: those follow prompts badly, and fine-tuning works on them"
    return Reason(
        "small_models_are_prompted_badly",
        ("format", "tone", "skill"),
        why,
        "Mosbach 2023",
        "published",
        concerns=("prompt",),
    )


def private_rows(facts: Situation) -> Reason | None:
    """Carlini 2021 again (unverified): a model is as secret as the text that it was trained on."""
    if not facts.private:
        return None
    why = "keep the trained model as secret as its text, which can be pulled out of it word for word"
    source = "Carlini 2021, unverified"
    return Reason("private_rows", NEEDS, why, source, "published", concerns=TRAINING)


def safety(_: Situation) -> Reason | None:
    """Qi 2023 (2310.03693): harmless rows raised a chat model's harmful answers from .3% to 16.1%, with LoRA 25.2%."""
    why = "harmless rows raised the harmful answers of a chat model from 0.3% to 16%, with LoRA to 25%: ask it such "
    why += "questions before and after"
    return Reason("safety", NEEDS, why, "Qi 2023", "published", concerns=("sft",))

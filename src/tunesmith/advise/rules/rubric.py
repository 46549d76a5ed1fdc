"""The rules of `tunesmith advise`, a row for each, with its source.

In: Requirements. Out: a RuleResult for each rule that applies. A rule recommends some approaches
and rules out others, for the needs that it names; nothing is weighed. The order of RULES is that of
the printed reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from tunesmith.advise.rules.facts import NEEDS, Need, Requirements

Approach = Literal[
    "prompt", "constrained decoding", "retrieval", "another base", "cpt", "sft", "preference"
]
APPROACHES: tuple[Approach, ...] = get_args(Approach)
TRAINING_APPROACHES: tuple[Approach, ...] = ("cpt", "sft", "preference")
# published: in the sources named; extrapolated: from them to this case; unverified: cited from
# memory; ours: a judgment, or a measurement that the source names
RuleConfidence = Literal["published", "extrapolated", "unverified", "ours"]

BYTES_PER_TOKEN = 4  # English; fewer in other languages and in code
MIN_EXAMPLES = 50
MIN_PAIRS = 500
MIN_TEXT_BYTES = 1_300_000 * BYTES_PER_TOKEN
AMPLE_TEXT_BYTES = 1_000_000_000 * BYTES_PER_TOKEN
MAX_PROMPT_TOKENS = 32_000
MAX_PROMPT_BYTES = MAX_PROMPT_TOKENS * BYTES_PER_TOKEN
MIN_PARAPHRASES = 10
MIN_MONTHLY_REQUESTS = 1_000
PLATEAU_EXAMPLES = 1_000
QUANTIZED_BYTES = 0.7  # per parameter: 4-bit weights, their scales, and a cache for a short prompt

FORMAT_NEEDS: tuple[Need, ...] = ("format", "tool-calling")
PROMPTED_NEEDS: tuple[Need, ...] = (*FORMAT_NEEDS, "tone", "skill", "translation", "safety")


@dataclass(frozen=True)
class RuleResult:
    """The conclusion of a rule for `needs`; `concerns` are the approaches that it comments on."""

    needs: tuple[Need, ...]
    explanation: str
    source: str
    confidence: RuleConfidence
    recommended: tuple[Approach, ...] = ()
    ruled_out: tuple[Approach, ...] = ()
    concerns: tuple[Approach, ...] = ()
    common_advice: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Rule:
    """A row of the rubric; {fields} of the explanation are those of Numbers."""

    name: str
    needs: tuple[Need, ...]
    applies: Callable[[Numbers], bool]
    explanation: str
    source: str = ""  # author, year, arXiv number
    confidence: RuleConfidence = "ours"
    recommended: tuple[Approach, ...] = ()
    ruled_out: tuple[Approach, ...] = ()
    concerns: tuple[Approach, ...] = ()
    common_advice: str = ""

    def apply(self, requirements: Requirements) -> RuleResult | None:
        numbers = Numbers(requirements)
        if not self.applies(numbers):
            return None
        shared = {k: v for k, v in vars(self).items() if k not in ("name", "applies")}
        shared["explanation"] = self.explanation.format(n=numbers)
        return RuleResult(**shared, rule=self.name)


def is_always(_: Numbers) -> bool:
    return True


class Numbers:
    """The facts, where an unknown count is 0."""

    def __init__(self, requirements: Requirements) -> None:
        self.facts = requirements
        self.examples = requirements.examples or 0
        self.pairs = requirements.pairs or 0
        self.text_bytes = requirements.raw_text or 0
        self.tokens = self.text_bytes // BYTES_PER_TOKEN
        self.million_tokens = f"{self.text_bytes / BYTES_PER_TOKEN / 1e6:,.1f}"
        self.context = requirements.context or 0
        self.prompt = requirements.prompt or "untried"
        self.failed = self.prompt in ("bad", "close")
        self.works = self.prompt in ("good", "close")
        self.paraphrases = requirements.paraphrases or 0
        is_many = self.paraphrases >= MIN_PARAPHRASES
        self.has_paraphrases = is_many and self.examples >= MIN_EXAMPLES
        self.change = requirements.facts_change or "at an unknown rate"
        self.needed_gb = f"{(requirements.params or 0) * QUANTIZED_BYTES / 1e9:.1f}"
        self.device_gb = f"{(requirements.device_memory or 0) / 1e9:.1f}"

    @property
    def is_too_large(self) -> bool:
        params = self.facts.params
        memory = self.facts.device_memory
        return params is not None and memory is not None and params * QUANTIZED_BYTES > memory

    @property
    def is_too_long(self) -> bool:
        base_context = self.facts.base_context
        return base_context is not None and self.context > base_context


RULES: tuple[Rule, ...] = (
    Rule(
        "switch_base_language",
        NEEDS,
        lambda n: n.facts.base_language is False and n.text_bytes < AMPLE_TEXT_BYTES,
        "the base model lacks the language: that takes billions of tokens, not rows. Use a base "
        "whose model card names it",
        recommended=("another base",),
        ruled_out=("cpt", "sft", "preference"),
    ),
    Rule(
        "switch_base_at_chance",
        NEEDS,
        lambda n: n.facts.base_at_chance is True,
        "by likelihood the base model chooses right answers no more often than chance: training "
        "would have to teach the task itself. Measure a larger base, or one of another family",
        recommended=("another base",),
        ruled_out=("preference",),
    ),
    Rule(
        "switch_base_context",
        NEEDS,
        lambda n: n.is_too_long,
        "requests of {n.context:,} tokens exceed the context of {n.facts.base_context:,}; rows of "
        "fewer tokens do not lengthen it",
        recommended=("another base",),
        ruled_out=("sft", "preference"),
    ),
    Rule(
        "switch_base_size",
        ("on-device", "latency"),
        lambda n: n.is_too_large,
        "the base needs about {n.needed_gb} GB in 4 bits, the device has {n.device_gb} GB: use a "
        "smaller one",
        recommended=("another base",),
        ruled_out=("sft", "preference"),
    ),
    Rule(
        "recommend_good_prompt",
        tuple(need for need in NEEDS if need not in ("latency", "on-device")),
        lambda n: n.prompt == "good",
        "the prompt works well: anything else would add cost and a model to maintain",
        recommended=("prompt",),
        ruled_out=TRAINING_APPROACHES,
    ),
    Rule(
        "reject_needless_retrieval",
        ("facts", "domain"),
        lambda n: n.prompt == "good",
        "the prompt works well without documents",
        ruled_out=("retrieval",),
    ),
    Rule(
        "recommend_trying_prompts",
        PROMPTED_NEEDS,
        lambda n: n.prompt == "untried",
        "no prompt has been tried: it takes an afternoon, and its score is what training has to "
        "beat. Try several: formatting alone moves accuracy by a median of 7.5 points, by up to 76",
        "Sclar 2023 (2310.11324)",
        "published",
        recommended=("prompt",),
    ),
    Rule(
        "reject_untested_training",
        (*FORMAT_NEEDS, "skill", "translation", "safety"),
        lambda n: n.prompt == "untried",
        "training may not be needed; measure a prompt first",
        ruled_out=("sft", "preference"),
    ),
    Rule(
        "recommend_few_shot",
        PROMPTED_NEEDS,
        lambda n: 0 < n.examples < MIN_EXAMPLES and n.prompt != "good",
        "{n.examples} examples fit into the prompt: all of them, or those most similar to the "
        "question",
        recommended=("prompt",),
    ),
    Rule(
        "recommend_retrieval",
        ("facts",),
        is_always,
        "accuracy of a 7B model on events after its cutoff: 0.481 as it is, 0.504 fine-tuned, "
        "0.875 with retrieval. Retrieval needs documents that hold the answers",
        "Ovadia 2023 (2312.05934)",
        "published",
        recommended=("retrieval",),
    ),
    Rule(
        "recommend_facts_in_prompt",
        ("facts",),
        lambda n: 0 < n.text_bytes <= MAX_PROMPT_BYTES,
        "about {n.tokens:,} tokens: all of it fits into a prompt",
        recommended=("prompt",),
        ruled_out=("retrieval",),
    ),
    Rule(
        "reject_training_facts",
        ("facts",),
        lambda n: not n.has_paraphrases,
        "learning new facts teaches hallucination: accuracy fell from 37.5% with early stopping to "
        "25.8% at convergence",
        "Gekhman 2024 (2405.05904)",
        "published",
        ruled_out=TRAINING_APPROACHES,
    ),
    Rule(
        "cite_distinct_facts",
        ("facts",),
        is_always,
        "a 135M model trained on ten wordings of each fact learnt 1, 2 and 5 of 60 (three seeds); "
        "by retrieval it answered 2",
        "experiments/distinct_facts",
        concerns=("retrieval", "sft"),
    ),
    Rule(
        "recommend_paraphrased_facts",
        ("facts",),
        lambda n: n.has_paraphrases,
        "with {n.paraphrases} wordings of each fact, weights learn some, in addition to "
        "retrieval: a corpus rewritten to 350 times its length gave 56.2, retrieval 60.4, both "
        "62.6",
        "Ovadia 2023 (2312.05934), Yang 2024 (2409.07431)",
        "extrapolated",
        recommended=("sft",),
        common_advice="facts belong in an index only",
    ),
    Rule(
        "reject_training_changing_facts",
        ("facts",),
        lambda n: n.facts.facts_change not in ("never", "yearly"),
        "they change {n.change}: an index updates in seconds, weights need training and evaluation",
        ruled_out=TRAINING_APPROACHES,
    ),
    Rule(
        "reject_training_private_facts",
        ("facts",),
        lambda n: bool(n.facts.private),
        "anyone who can query a model can extract training text verbatim; an index can check "
        "permissions",
        "Carlini 2021 (2012.07805)",
        "published",
        ruled_out=TRAINING_APPROACHES,
    ),
    Rule(
        "recommend_constrained_decoding",
        FORMAT_NEEDS,
        is_always,
        "a grammar or JSON schema in the server makes every finished answer, or tool call, valid "
        "without training; it does not make its content correct",
        "Willard & Louf 2023 (2307.09702), Dong 2024 (2411.15100)",
        "published",
        recommended=("constrained decoding",),
        common_advice="fine-tune for JSON without elaborate prompts",
    ),
    Rule(
        "recommend_sft_for_format",
        ("format",),
        lambda n: n.failed,
        "prompts were not enough, and a grammar does not fill in the right values. A 135M model "
        "went from 0% to 96% schema-valid answers with 260 rows",
        "tunesmith demo",
        recommended=("sft",),
    ),
    Rule(
        "recommend_sft_for_tools",
        ("tool-calling",),
        lambda n: n.failed,
        "prompts were not enough: train calls together with rows in which no tool is to be called",
        recommended=("sft",),
    ),
    Rule(
        "recommend_sft_for_tone",
        ("tone",),
        is_always,
        "with 100 examples more than 90% of answers had the tone, against 23 to 46% with prompts; "
        "more than 1,000 examples added little",
        "Marquardt & Brule 2025 (2507.04889)",
        "published",
        recommended=("sft",),
    ),
    Rule(
        "suggest_thousand_rows",
        ("format", "tone"),
        lambda n: n.examples >= 2 * PLATEAU_EXAMPLES,
        "1,000 good rows may do as well as all {n.examples:,}: 2,000 filtered rows scored 3.83 of "
        "6, unfiltered ones 3.33, and 32,000 no more. Compare any selection with a random 1,000, "
        "which few beat",
        "Zhou 2023 (2305.11206), Xia 2024 (2410.09335)",
        "published",
        concerns=("sft",),
    ),
    Rule(
        "recommend_prompt_distillation",
        ("latency",),
        lambda n: n.works,
        "the good answers of the long prompt are training rows: a 770M model trained on a large "
        "one's answers and rationales beat a prompted 540B model on one benchmark. First check "
        "what prefix caching in the server already saves",
        "Hsieh 2023 (2305.02301)",
        "published",
        recommended=("sft",),
    ),
    Rule(
        "reject_premature_distillation",
        ("latency",),
        lambda n: not n.works,
        "no prompt gives good answers yet: there is nothing to make cheaper",
        recommended=("prompt",),
        ruled_out=("sft",),
    ),
    Rule(
        "reject_few_requests",
        ("latency",),
        lambda n: (n.facts.requests_month or MIN_MONTHLY_REQUESTS) < MIN_MONTHLY_REQUESTS,
        "{n.facts.requests_month:,} requests a month save too little to pay for a model of your "
        "own",
        recommended=("prompt",),
        ruled_out=("sft",),
    ),
    Rule(
        "recommend_small_model",
        ("on-device",),
        is_always,
        "a small model follows prompts poorly: train one that fits in 4 bits (0.7 bytes per "
        "parameter, cache included) on answers of a large one, and measure the quantized export",
        recommended=("sft",),
    ),
    Rule(
        "recommend_long_prompt",
        ("long-context",),
        lambda n: not n.is_too_long and n.context <= MAX_PROMPT_TOKENS,
        f"up to {MAX_PROMPT_TOKENS:,} tokens fit into a prompt: send requests whole, and measure "
        "on such long items",
        recommended=("prompt",),
    ),
    Rule(
        "recommend_passages",
        ("long-context",),
        lambda n: n.context > MAX_PROMPT_TOKENS,
        "{n.context:,} tokens for each request are slow: send the passages that matter",
        recommended=("retrieval",),
    ),
    Rule(
        "recommend_sft_for_translation",
        ("translation",),
        lambda n: n.failed,
        "prompts were not enough: train on few good sentence pairs, after text in a language that "
        "the base hardly knows. Both gave 7B and 13B models 12 BLEU more than zero-shot",
        "Xu 2023 (2309.11674)",
        "published",
        recommended=("sft",),
    ),
    Rule(
        "recommend_continued_pretraining",
        ("domain", "translation"),
        lambda n: n.text_bytes >= MIN_TEXT_BYTES,
        "about {n.million_tokens} million tokens of raw text: a language is learned from text, not "
        "from questions. It helped classification in all four domains tried",
        "Gururangan 2020 (2004.10964)",
        "extrapolated",
        recommended=("cpt",),
    ),
    Rule(
        "reject_small_corpus",
        ("domain",),
        lambda n: n.text_bytes < MIN_TEXT_BYTES,
        "{n.million_tokens} million tokens of raw text: training on 1.3 million made an 8B model "
        "worse (39.5 to 38.2), retrieval from the same text made it better (60.4)",
        "Yang 2024 (2409.07431)",
        "published",
        ruled_out=("cpt",),
        common_advice="continued pretraining for private domain language",
    ),
    Rule(
        "recommend_retrieval_of_text",
        ("domain",),
        lambda n: 0 < n.text_bytes < MIN_TEXT_BYTES,
        "there is text to retrieve from, and too little to train on",
        recommended=("retrieval",),
    ),
    Rule(
        "recommend_sft_after_cpt",
        ("domain",),
        lambda n: n.text_bytes >= MIN_TEXT_BYTES,
        "raw text taught 7B models three domains and hurt their answers to questions: follow it "
        "with a small set of questions and answers",
        "Cheng 2023 (2309.09530)",
        "extrapolated",
        recommended=("sft",),
    ),
    Rule(
        "recommend_sft_for_skill",
        ("skill",),
        lambda n: n.failed,
        "prompts were not enough, and skills grow with the number of examples by a power law: "
        "mathematics and code kept improving where chat was flat after 1,000",
        "Raghavendra 2024 (2410.03717), Dong 2023 (2310.05492)",
        "extrapolated",
        recommended=("sft",),
        common_advice="prefer 1,000 clean rows to 1,000,000 noisy ones; true of tone and format",
    ),
    Rule(
        "reject_few_examples",
        # a prompt that works, or a large model, writes the rows for a faster or smaller one
        tuple(need for need in NEEDS if need not in ("facts", "latency", "on-device")),
        lambda n: n.examples < MIN_EXAMPLES,
        "{n.examples} examples: clear gains need 50 to 100, plus some to measure with",
        "OpenAI's fine-tuning guide of 2024",
        "unverified",
        ruled_out=("sft",),
    ),
    Rule(
        "recommend_preference_training",
        ("tone", "skill", "safety"),
        lambda n: n.pairs >= MIN_PAIRS,
        "{n.pairs:,} pairs teach what not to do, which small models do not learn from prompts: "
        "told to avoid a topic, a 7B model mentioned it in 36% of answers instead of 33%. Comes "
        "after SFT, or on an instruct model",
        "Rafailov 2023 (2305.18290), Castricato 2024 (2402.07896)",
        "published",
        recommended=("preference",),
    ),
    Rule(
        "reject_few_pairs",
        ("tone", "skill", "safety"),
        lambda n: n.facts.pairs is not None and n.pairs < MIN_PAIRS,
        "{n.pairs} pairs; published runs use thousands. The chosen answers alone are rows for SFT",
        ruled_out=("preference",),
    ),
    Rule(
        "recommend_sft_for_safety",
        ("safety",),
        lambda n: n.failed,
        "prompts were not enough: train refusals together with harmless questions that sound "
        "alike, else it refuses those too. A filter before and after the model stays necessary",
        recommended=("sft",),
    ),
    Rule(
        "suggest_raft_training",
        NEEDS,
        lambda n: "facts" in n.facts.need and len(n.facts.need) > 1,
        "if you do both, train with retrieved documents in the prompt, wrong ones included: a "
        "model tuned without them got worse at reading them (61.1 to 42.6)",
        "Zhang 2024, RAFT (2403.10131)",
        "published",
        concerns=("retrieval", "sft"),
    ),
    Rule(
        "warn_training_data_extraction",
        NEEDS,
        lambda n: bool(n.facts.private),
        "keep the trained model as confidential as its training text, which can be extracted from "
        "it verbatim",
        "Carlini 2021 (2012.07805)",
        "published",
        concerns=TRAINING_APPROACHES,
    ),
    Rule(
        "warn_safety_loss",
        NEEDS,
        is_always,
        "benign rows raised the harmful answers of a chat model from 0.3% to 16%, with LoRA to "
        "25%: test with harmful questions before and after",
        "Qi 2023 (2310.03693)",
        "published",
        concerns=("sft",),
    ),
)

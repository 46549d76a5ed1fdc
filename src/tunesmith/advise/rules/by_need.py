"""Rules for one need each: facts, format and tone, cost, the language of a domain, skills. See rubric.py."""

from __future__ import annotations

from tunesmith.advise.rules.questionnaire import Situation
from tunesmith.advise.rules.reason import (
    BYTES_A_TOKEN,
    ENOUGH_TEXT,
    FITS_A_PROMPT,
    GOLDEN,
    LEAST_EXAMPLES,
    LEAST_PARAPHRASES,
    LEAST_REQUESTS,
    LEAST_TEXT,
    TRAINING,
    Answer,
    Confidence,
    Reason,
)

# ---------------------------------------------------------------- facts


def facts_looked_up(facts: Situation) -> Reason | None:
    """Ovadia 2023 (2312.05934), events after training, Mistral-7B: base .481, fine-tuned .504, fine-tuned on
    paraphrases .588, retrieval .875. Tuned on plain text only."""
    why = "on events that a 7B model had not seen: .481 as it was, .504 fine-tuned, .875 with retrieval"
    if not facts.raw_text:
        why += ". It needs the documents, and none are named: write them down first"
    return Reason("facts_looked_up", ("facts",), why, "Ovadia 2023", "published", helps=("retrieval",))


def facts_fit_the_prompt(facts: Situation) -> Reason | None:
    """Most models read 32,000 tokens whole, small ones fewer; a server that caches prefixes pays for them once."""
    if not 0 < (facts.raw_text or 0) <= FITS_A_PROMPT:
        return None
    why = f"about {(facts.raw_text or 0) // BYTES_A_TOKEN:,} tokens: all of it fits into the prompt of most models"
    return Reason("facts_fit_the_prompt", ("facts",), why, "", "ours", helps=("prompt",), rules_out=("retrieval",))


def facts_in_weights(facts: Situation) -> Reason | None:
    """Gekhman 2024 (2405.05904): trained on facts it did not know, a model falls from 37.5 (early stop) to 25.8 right
    answers at convergence. Not where each fact is said in many ways (`facts_said_many_ways`)."""
    if _said_many_ways(facts):
        return None
    why = "from few wordings facts are learned late and badly, and learning them teaches to make things up: "
    why += "right answers fell from 37.5%, had training stopped early, to 25.8%"
    return Reason("facts_in_weights", ("facts",), why, "Gekhman 2024", "published", rules_out=TRAINING)


def facts_said_many_ways(facts: Situation) -> Reason | None:
    """The exception. Ovadia 2023: accuracy rises with the number of paraphrases (.504 -> .588, retrieval .875).
    EntiGraph, Yang 2024 (2409.07431): 1.3M tokens rewritten into 455M: 39.5 -> 56.2, retrieval 60.4, both 62.6."""
    if not _said_many_ways(facts):
        return None
    why = f"each fact is said in {facts.paraphrases} ways: then weights do take facts, as an addition to retrieval. "
    why += "Rewritten to 350 times its length, a corpus gave 56.2, retrieval 60.4, both 62.6"
    usual = "facts belong into an index only"
    return Reason(
        "facts_said_many_ways", ("facts",), why, "Ovadia 2023, Yang 2024", "extrapolated", helps=("sft",), usual=usual
    )


def _said_many_ways(facts: Situation) -> bool:
    return (facts.paraphrases or 0) >= LEAST_PARAPHRASES and (facts.examples or 0) >= LEAST_EXAMPLES


def facts_change(facts: Situation) -> Reason | None:
    """What is trained in today is wrong after the next change; an index takes a new document in seconds."""
    if facts.facts_change in ("never", "yearly"):
        return None
    change = "how often they change is not said" if facts.facts_change is None else f"they change {facts.facts_change}"
    why = f"{change}: an index is updated in seconds, weights by training and measuring again"
    return Reason("facts_change", ("facts",), why, "", "ours", rules_out=TRAINING)


def private_facts(facts: Situation) -> Reason | None:
    """Carlini 2021 (2012.07805, Extracting Training Data from Large Language Models; from memory, unverified): hundreds
    of training texts were pulled out of GPT-2 word for word, some that stood in one document only. Retrieval can look
    at who asks."""
    if not facts.private:
        return None
    why = "who may use a model can pull its training text out word for word; an index can look at who asks"
    return Reason(
        "private_facts",
        ("facts",),
        why,
        "Carlini 2021, unverified",
        "published",
        rules_out=TRAINING,
    )


# ---------------------------------------------------------------- format, tone


def format_constrained(_: Situation) -> Reason | None:
    """Willard & Louf 2023 (2307.09702), Dong 2024 (2411.15100): tokens that the grammar does not allow are never
    sampled, so whatever is finished is valid. What stands in the fields is the model's."""
    why = "a grammar or JSON schema in the server makes every finished answer valid, without training; not its content"
    usual = "fine-tuning, for JSON without elaborate prompts"
    return Reason(
        "format_constrained",
        ("format",),
        why,
        "Willard & Louf 2023, Dong 2024",
        "published",
        helps=("constrained decoding",),
        usual=usual,
    )


def format_trained(facts: Situation) -> Reason | None:
    """`tunesmith demo`, SmolLM2-135M-Instruct, 235 rows: answers valid against the schema 0 -> .963 of 80 held-out."""
    if facts.prompt not in ("bad", "close"):
        return None
    why = (
        "prompts were not enough, and a grammar does not put the right values into the fields. A 135M model went from "
    )
    why += "0 to 96% schema-valid answers on 235 rows"
    return Reason("format_trained", ("format",), why, "tunesmith demo", "ours", helps=("sft",))


def tone_trained(_: Situation) -> Reason | None:
    """Marquardt & Brule 2025 (2507.04889): above 90 to 95% on tone with 100 examples, 23 to 46% prompted; little more
    after about 1,000."""
    why = "with 100 examples more than 90% of answers had the tone, prompted 23 to 46%; little more came after 1,000"
    return Reason("tone_trained", ("tone",), why, "Marquardt & Brule 2025", "published", helps=("sft",))


def thousand_will_do(facts: Situation) -> Reason | None:
    """LIMA, Zhou 2023 (2305.11206): 2,000 filtered rows scored 3.83, unfiltered 3.33; no gain from 2,000 to 32,000.
    Xia 2024 (2410.09335): at scale hardly any way of choosing beats chance."""
    if (facts.examples or 0) < 2 * GOLDEN:
        return None
    why = f"for format and tone a thousand good rows may do as well as all {facts.examples:,}: 2,000 filtered rows "
    why += (
        "scored 3.83 of 6, unfiltered 3.33, and 32,000 no more. Keep a random thousand beside any choice: few beat it"
    )
    return Reason("thousand_will_do", ("format", "tone"), why, "Zhou 2023, Xia 2024", "published", concerns=("sft",))


# ---------------------------------------------------------------- cost


def shorter_prompt(facts: Situation) -> Reason | None:
    """Snell 2022 (2209.15189, Learning by Distilling Context): a prompt's instructions and examples can be trained into
    the weights. Hsieh 2023 (2305.02301, Distilling Step-by-Step): a 770M model tuned on a large one's answers and
    rationales did better than a prompted one of 540B. Both from memory, unverified."""
    if facts.prompt not in ("good", "close"):
        return None
    why = (
        "the good answers of the long prompt are the rows: train them with a short one, or into a smaller model. First "
    )
    why += "see what a server that caches the common prefix leaves of the cost"
    source = "Snell 2022, Hsieh 2023, unverified"
    return Reason("shorter_prompt", ("latency",), why, source, "published", helps=("sft",))


def nothing_to_shorten(facts: Situation) -> Reason | None:
    """A model is made cheaper after it is good: the answers to train on come from the prompt."""
    if facts.prompt in ("good", "close"):
        return None
    why = "no prompt is known that answers well: there is nothing yet to make cheaper"
    return Reason("nothing_to_shorten", ("latency",), why, "", "ours", helps=("prompt",), rules_out=("sft",))


def too_few_requests(facts: Situation) -> Reason | None:
    """1,000 requests a month are 33 a day: what they save does not pay for making a model and keeping it."""
    if facts.requests_month is None or facts.requests_month >= LEAST_REQUESTS:
        return None
    why = f"{facts.requests_month:,} requests a month: what they could save does not pay for a model of your own"
    return Reason("too_few_requests", ("latency",), why, "", "ours", helps=("prompt",), rules_out=("sft",))


# ---------------------------------------------------------------- language of a domain


def domain_pretrained(facts: Situation) -> Reason | None:
    """Gururangan 2020 (2004.10964, Don't Stop Pretraining; from memory, unverified): a second pretraining on 2 to 8
    billion tokens of a domain helped in all four."""
    if (facts.raw_text or 0) < LEAST_TEXT:
        return None
    why = f"about {_millions(facts)} million tokens of raw text: a language is learned from text, not from questions. "
    why += "It helped in all four domains tried, with 2 to 8 billion tokens"
    sure: Confidence = "published" if (facts.raw_text or 0) >= ENOUGH_TEXT else "extrapolated"
    source = "Gururangan 2020, unverified"
    return Reason("domain_pretrained", ("domain",), why, source, sure, helps=("cpt",))


def domain_too_small(facts: Situation) -> Reason | None:
    """Yang 2024 (2409.07431), Llama-3-8B on 1.3M raw tokens: 39.49 -> 38.15; with retrieval 60.35."""
    if (facts.raw_text or 0) >= LEAST_TEXT:
        return None
    text = f"about {_millions(facts)} million tokens" if facts.raw_text else "no raw text is named"
    why = f"{text}: 1.3 million made an 8B model worse (39.5 to 38.2), the same text looked up made it better (60.4)"
    helps: tuple[Answer, ...] = ("retrieval",) if facts.raw_text else ()
    usual = "continued pretraining for private domain language"
    return Reason(
        "domain_too_small", ("domain",), why, "Yang 2024", "published", helps=helps, rules_out=("cpt",), usual=usual
    )


def _millions(facts: Situation) -> str:
    return f"{(facts.raw_text or 0) / BYTES_A_TOKEN / 1e6:,.1f}"


def tasks_after_the_language(facts: Situation) -> Reason | None:
    """Cheng 2023 (2309.09530, Adapting Large Language Models via Reading Comprehension; from memory, unverified):
    pretraining on a domain's raw text adds knowledge and costs the ability to answer questions. Their remedy is
    questions within the text; that a small SFT set does the same is the usual practice."""
    if (facts.raw_text or 0) < LEAST_TEXT:
        return None
    why = (
        "plain text teaches the language and costs some of the ability to answer: a small set of questions and answers "
    )
    why += "comes after it"
    source = "Cheng 2023, unverified"
    return Reason("tasks_after_the_language", ("domain",), why, source, "extrapolated", helps=("sft",))


# ---------------------------------------------------------------- skills


def skill_trained(facts: Situation) -> Reason | None:
    """Raghavendra 2024 (2410.03717): skills follow a power law in the number of examples. Dong 2023 (2310.05492): chat
    is flat after about 1,000, mathematics and code are not."""
    if facts.prompt not in ("bad", "close"):
        return None
    why = "prompts were not enough, and skills grow with the examples by a power law: mathematics and code did not "
    why += "flatten where chat did, at 1,000"
    sure: Confidence = "published" if (facts.examples or 0) >= GOLDEN else "extrapolated"
    usual = "1,000 perfect examples against 1,000,000 noisy ones; true of tone and format"
    return Reason("skill_trained", ("skill",), why, "Raghavendra 2024, Dong 2023", sure, helps=("sft",), usual=usual)

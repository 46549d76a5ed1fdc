"""experiments/constraint_baselines: rules in the prompt, and bans of token sequences."""

from experiment_modules import load_experiment
from tunesmith.core.types import Example, Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.evaluate.generate_until import build_prompts
from tunesmith.recipe.fields import Constraint

baselines = load_experiment("constraint_baselines")

SORRY, ROBOT = (
    Constraint.model_validate({"check": "apology"}),
    Constraint.model_validate({"match": "(?i)robot"}),
)
BOTH = (SORRY, ROBOT)


def chat(answer: str, system: str = "", **more: object) -> Example:
    turns: list[Json] = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": answer},
    ]
    turns = [{"role": "system", "content": system}, *turns] if system else turns
    weights = tuple(float(turn["role"] == "assistant") for turn in turns)
    return Example(**{"id": "test:1", "messages": tuple(turns), "turn_weights": weights, **more})  # type: ignore[arg-type]


def test_the_rules_quote_what_was_said() -> None:
    bad = baselines.collect_bad_strings(
        BOTH, [("a", "a robot"), ("b", "A Robot, robot, sorry"), ("c", "fine")]
    )
    assert bad == {"apology": ["sorry"], "(?i)robot": ["robot", "Robot"]}
    text = baselines.format_rules(BOTH, bad)
    assert text.splitlines() == [
        "Rules for every answer:",
        "- Never apologise or say sorry.",
        '- Never write "robot" or "Robot".',
    ]
    assert baselines.format_rules(BOTH, {"apology": [], "(?i)robot": []}).endswith(
        '- Never write "(?i)robot".'
    )


def test_the_model_is_told_in_its_system_message(renderer: Renderer) -> None:
    plain, stored = (
        baselines.add_rules(chat("fine"), "RULES"),
        baselines.add_rules(chat("fine", system="Be brief."), "RULES"),
    )
    assert plain.messages[0] == {"role": "system", "content": "RULES"}
    assert stored.messages[0] == {"role": "system", "content": "Be brief.\n\nRULES"}
    for example, before in ((plain, chat("fine")), (stored, chat("fine", system="Be brief."))):
        (requests,), (first,) = (
            build_prompts([example], renderer),
            build_prompts([before], renderer),
        )
        assert requests.expected == first.expected
        assert "RULES" in renderer.decode(requests.prompt_ids)
    assert baselines.add_rules(Example("a", text=" b", prompt="a"), "RULES").prompt == "RULES\n\na"


def test_bans_are_how_bad_strings_begin(renderer: Renderer) -> None:
    result = baselines.tokenize_bans({"a": ["no", "sorry"], "b": ["no"]}, renderer)
    assert [renderer.decode(tokens) for tokens in result] == ["no", " no", "sorr", " sor"]
    assert max(map(len, result)) == baselines.MAX_BAN_TOKENS

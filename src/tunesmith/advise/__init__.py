"""Should this be fine-tuned? Facts in, advice with its reasons out; no model, no torch.

    situation.py  what is needed and what there is, from flags, a file, a recipe or answers
    reason.py     what a rule says
    rubric.py     the rules, each with its source; they stand in anyneed.py and eachneed.py
    advice.py     the rules put together, and what would change the answer

Left out: measuring prompts, retrieval and short trainings on the user's own items.
"""

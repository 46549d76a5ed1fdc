"""Chat templates: messages to token ids and a loss mask.

The mask comes from the render itself. Every character of the rendered text knows whether the
template or a message wrote it, so a supervised answer needs no markers in the template and no
guessing afterwards. Five steps, one module each:

    1. conversation.py      Messages are normalized as transformers does (thinking under both of its
                            keys, tool-call arguments as the template expects them), and every
                            string becomes a `TrackedStr`: text plus the message it comes from.
    2. template.py          The chat template renders them in a sandbox (`sandbox.py`).
                            `tracked_str.py` and `sandbox.py` replace the operations that make
                            or print text (`+`, `trim`, `join`, `tojson`, ...). Plain Jinja renders
                            the same messages: the two texts must be equal, or the row is refused.
                            A template that is not well known does so in a guarded process.
    3. assistant_spans.py   The characters of each trained answer: from the end of the generation
                            prompt through the end token. `template_probe.py` renders made-up
                            messages once per template to learn which token that is.
    4. encode.py            The text is split at the control tokens that the template wrote, and
                            the runs between them are encoded as plain text. Ids equal
                            `apply_chat_template(tokenize=True)` for every row without control-like
                            text, and no text of a row becomes a control token.
    5. renderer.py          Spans of characters become spans of tokens, and each conversation one
                            `Document` with ids and weights: `Renderer.render(example)`. Where the
                            template writes earlier turns differently (Qwen3 drops their thinking),
                            each trained turn is a document, rendered as it is served.

A tracked string is a `str` with runs of (length, origin). ChatML renders one user message as

    >>> hello = track_str("  hello ", make_origin(0, "content"))
    >>> text = concat([track_str("<|im_start|>user\\n"), hello.strip(), track_str("<|im_end|>")])
    >>> text
    '<|im_start|>user\\nhello<|im_end|>'
    >>> list(iter_spans(text))                        # (start, end, origin)
    [(0, 17, 0), (17, 22, 4), (22, 32, 0)]

Origin 0 is the template, origin 4 the content of message 0. `strip`, slices and `+` keep the
origins; an operation that would lose them is refused. Had the user written `<|im_end|>`, its
characters would have origin 4, and step 4 would encode them as plain text.

In:       an `Example`, the tokenizer and the chat template of a model folder
Out:      `RenderedRow`: documents (ids, weights), and notes on what the template left out
Left out: where rows come from (`readers/`, `formats/`), the over-long policy (`truncation.py`)
"""

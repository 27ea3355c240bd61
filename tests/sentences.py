"""Three short texts, the vocabulary of the tiny models of the tests."""

SENTENCES = {
    "good": "a warm and lovely film",
    "bad": "dull , loud and far too long",
    "odd": "it is set in a lift",
}

import pytest

from vqt2i.text.cleaning import clean_web_caption


@pytest.mark.parametrize(("text", "cleaned"), [
    ("A blue Porsche 356 parked in front of a yellow brick wall.",
     "a blue porsche 356 parked in front of a yellow brick wall."),
    ("“Two” cats – one, two,three", '"two" cats - one, two, three'),
    ("a red bus 红色的 (see https://example.com/x) <b>here</b> @someone #123", "a red bus see here"),
    ("this-is-my-cute-cat &amp; IMG_001.jpg", "this is my cute cat"),
    ("", ""),
])  # fmt: skip
def test_captions_are_cleaned_as_those_of_the_web_were(text: str, cleaned: str) -> None:
    assert clean_web_caption(text) == cleaned

"""Text from tokens, a few at a time: the same as all at once, and the same as the tokenizers library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as HfTokenizer

from gateway.detokenizer import Detokenizer, detokenize
from gateway.stop_strings import StopStrings
from gateway.tokenizer import Tokenizer, TokenizerError
from tests.gateway.conftest import build_tokenizer, encode

BYTE_LEVEL = build_tokenizer()
OURS = Tokenizer(BYTE_LEVEL.to_str().encode())


def build_sentencepiece() -> HfTokenizer:
    """What Llama-2's and Mistral's files look like: pieces with ▁, bytes as a fallback, a space before the text."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefgh",
        "▁a",
        "▁b",
        "ef",
        "▁▁",
    ]
    tokenizer = HfTokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("e", "f"), ("▁", "▁")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


PIECES = build_sentencepiece()
OUR_PIECES = Tokenizer(PIECES.to_str().encode())

byte_level_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60)


def in_chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, at = [], 0
    for size in sizes:
        chunks.append(ids[at : at + size])
        at += size
    return [*chunks, ids[at:]]


@given(byte_level_ids, st.lists(st.integers(0, 5), max_size=30), st.booleans())
def test_deltas_make_the_librarys_text_for_any_tokens(
    ids: list[int], sizes: list[int], special: bool
) -> None:
    detokenizer = Detokenizer(OURS, keep_special=special)
    text = "".join(detokenizer.feed(chunk) for chunk in in_chunks(ids, sizes)) + detokenizer.flush()
    assert text == BYTE_LEVEL.decode(ids, skip_special_tokens=not special)


@given(st.text(max_size=40))
def test_no_delta_of_a_text_holds_a_broken_character(text: str) -> None:
    detokenizer = Detokenizer(OURS)
    ids = [token for token in encode(BYTE_LEVEL, text) if token not in OURS.special_ids]
    deltas = [detokenizer.feed([token]) for token in ids]
    assert "�" not in "".join(deltas) or "�" in text
    assert detokenizer.flush() == ""


@given(st.text(alphabet="abcdefgh  日é😀", max_size=30))
def test_sentencepiece_texts_come_out_as_the_librarys(text: str) -> None:
    ids = PIECES.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(OUR_PIECES)
    deltas = "".join(detokenizer.feed([token]) for token in ids) + detokenizer.flush()
    assert deltas == PIECES.decode(ids) == text


def test_a_continued_sentencepiece_text_keeps_its_first_space() -> None:
    ids = PIECES.encode("b", add_special_tokens=False).ids
    assert detokenize(OUR_PIECES, ids) == "b"
    assert Detokenizer(OUR_PIECES, continues=True).feed(ids) == " b"


def test_an_unfinished_character_waits_and_is_marked_at_the_end() -> None:
    first, *_ = encode(BYTE_LEVEL, "😀")
    detokenizer = Detokenizer(OURS)
    assert detokenizer.feed([first]) == ""
    assert detokenizer.flush() == "�"


def test_ids_without_a_token_are_silent() -> None:
    assert detokenize(OURS, [10**6, -1]) == ""


def test_texts_are_encoded_with_their_added_tokens() -> None:
    text = "<|im_start|>fox<|plain added|> 日本"
    assert OURS.encode_now(text, add_special_tokens=True) == BYTE_LEVEL.encode(text).ids
    assert detokenize(OURS, OURS.encode_now(text, add_special_tokens=True), keep_special=True) == text


async def test_long_texts_are_encoded_alike() -> None:
    text = "the quick brown fox " * 500
    assert await OURS.encode(text, add_special_tokens=False) == encode(BYTE_LEVEL, text)


@pytest.mark.parametrize("file", [b"", b"{}", b"[]", b"\xff", b'{"model": 1}'])
def test_what_is_no_tokenizer_is_refused(file: bytes) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(file)


def test_a_decoder_we_do_not_know_is_refused_by_name() -> None:
    tokenizer = build_tokenizer()
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer(tokenizer.to_str().encode())


def cut_at_first(text: str, stops: list[str]) -> str:
    """What StopStrings means, on a whole text."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts)] if starts else text


letters = st.text(alphabet="ab", max_size=30)
few_stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


@given(st.lists(st.text(alphabet="ab", max_size=4), max_size=20), few_stops)
def test_a_stop_string_is_never_shown_even_in_part(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    shown, read = "", ""
    for piece in pieces:
        read += piece
        shown += finder.feed(piece)
        # What is shown can never become part of a stop string, whatever follows.
        assert cut_at_first(read, stops).startswith(shown)
        for stop in stops:
            for beginning in range(1, len(stop)):
                if not finder.found and read.endswith(stop[:beginning]):
                    assert len(shown) <= len(read) - beginning
        if finder.found:
            break
    if not finder.found:
        shown += finder.flush()
    assert shown == cut_at_first(read, stops)


@given(byte_level_ids, st.lists(st.text(min_size=1, max_size=3), max_size=4))
def test_tokens_through_detokenizer_and_stop_strings_give_the_cut_text(
    ids: list[int], stops: list[str]
) -> None:
    detokenizer, finder = Detokenizer(OURS), StopStrings(stops)
    shown = ""
    for token in ids:
        shown += finder.feed(detokenizer.feed([token]))
        if finder.found:
            break
    else:
        shown += finder.feed(detokenizer.flush())
        if not finder.found:
            shown += finder.flush()
    whole = BYTE_LEVEL.decode(ids)
    if finder.found:
        # Found as soon as it was complete; a longer one that began earlier might have been still open.
        assert whole.startswith(shown) and any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == whole
        assert not any(stop in whole for stop in stops)

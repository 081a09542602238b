"""The template: tokens equal to mistral-common's, masks exact to the token, whole turns within the context."""

import random
import shutil
import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers.models import TINY
from helpers.models.templates import MISTRAL_V1, MISTRAL_V3, Template, load_tokenizer, pad_token, save_tokenizer
from helpers.prepare.checks import CONTROLS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What Mistral-7B-Instruct-v0.3 ships: a system prompt goes into the last *message*, so never into a training row.
OFFICIAL_V3 = """\
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}\
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}\
{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}\
{%- if loop.last and system_message is defined %}\
{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}\
{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}\
{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"""

OFFICIAL_V1 = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + \
' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}\
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def with_template(tokenizer, text):
    """The tokenizer with another chat template."""
    other = load_tokenizer(TINY)
    other.chat_template = text
    return other


def talk(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def conversations(count=60):
    """Conversations with one to five exchanges, every second one with a system prompt, and awkward texts."""
    rng = random.Random(5)
    texts = [
        "Hello, how are you?", "Fine — and you?", "I'm doing great!", "1234567", "two  spaces", "x", "日本語のテキスト",
        "line one\nline two\n\n\tindented", "🙂🙃", "naïve café", "a" * 300, "def f(x):\n    return x", "[1, 2]",
    ]  # fmt: skip
    made = []
    for i in range(count):
        turns = [rng.choice(texts) for _ in range(2 * rng.randint(1, 5))]
        made.append(talk(*turns, system="You are terse.\nVery." if i % 2 else None))
    return made


@cache
def from_sentencepiece(path, legacy):
    """A fast tokenizer of Mistral's own vocabulary. legacy: as in older files on the hub, ▁ after special tokens."""
    from sentencepiece import SentencePieceProcessor
    from transformers.convert_slow_tokenizer import generate_merges

    words = SentencePieceProcessor(model_file=str(path))
    vocabulary = {words.id_to_piece(i): i for i in range(words.vocab_size())}
    scores = {piece: words.get_score(i) for piece, i in vocabulary.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, generate_merges(vocabulary, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece for piece, i in vocabulary.items() if words.is_control(i) or words.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", name_or_path=str(path)
    )
    fast.chat_template = MISTRAL_V3 if "[INST]" in vocabulary else MISTRAL_V1
    return fast


@pytest.mark.parametrize("legacy", [False, True], ids=["today's file", "legacy file"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_tokens_equal_mistral_common(version, legacy):
    """v1 is the tokenizer of Mistral 7B v0.1 and v0.2, v3 that of v0.3; their packages ship the vocabularies."""
    pytest.importorskip("mistral_common", reason="mistral-common is not installed: `make test` installs it")
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    files = sys.modules["mistral_common"].__path__[0]
    name = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}[version]
    reference = MistralTokenizer.from_file(f"{files}/data/{name}", mode=ValidationMode.finetuning)
    template = Template(from_sentencepiece(f"{files}/data/{name}", legacy))
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    for messages in conversations():
        request = ChatCompletionRequest(messages=[kinds[turn["role"]](content=turn["content"]) for turn in messages])
        ids, _, _ = template.encode([messages])[0]
        assert ids == reference.encode_chat_completion(request).tokens, messages


def trained_texts(template, ids, mask):
    """The text of each run of trained tokens."""
    runs, run = [], []
    for token, kept in zip([*ids, 0], [*mask, 0], strict=True):
        if kept:
            run.append(token)
        elif run:
            runs.append(template.tokenizer.decode(run))
            run = []
    return runs


def split_at_ends(texts, end):
    return [piece for text in texts for piece in text.split(end)[:-1]]


@pytest.mark.parametrize("jinja", [None, MISTRAL_V1, MISTRAL_V3, OFFICIAL_V3], ids=["own", "v1", "v3", "official v3"])
def test_whole_text_is_the_template_s(tokenizer, jinja):
    """Tokenizing chunk by chunk gives what tokenizing the rendered text at once gives."""
    other = with_template(tokenizer, jinja) if jinja else tokenizer
    template = Template(other)
    for messages in conversations():
        if messages[0]["role"] == "system" and jinja == OFFICIAL_V3:
            messages = template.fold_system(messages)
        ids, mask, ends = template.encode([messages])[0]
        assert ids == other.apply_chat_template(messages)["input_ids"]
        assert len(ends) == sum(turn["role"] == "assistant" for turn in messages)
        assert mask[0] == 0 and mask[ends[-1] - 1] == 1 and ids[ends[-1] - 1] == other.eos_token_id


def test_system_prompt_stands_where_the_version_wants_it(tokenizer):
    messages = talk("u1", "a1", "u2", "a2", system="Be brief.")
    first = "<s> [INST] Be brief.\n\nu1 [/INST] a1</s> [INST] u2 [/INST] a2</s>"
    last = "<s>[INST] u1[/INST] a1</s>[INST] Be brief.\n\nu2[/INST] a2</s>"
    assert Template(with_template(tokenizer, MISTRAL_V1)).text(messages) == first
    assert Template(with_template(tokenizer, MISTRAL_V3)).text(messages) == last
    assert Template(with_template(tokenizer, OFFICIAL_V3)).text(messages) == last
    assert Template(tokenizer).text(messages) == last


def test_a_template_without_an_end_gets_one(tokenizer):
    """Trap 8: a model that never sees its end token in training never stops."""
    plain = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    chunks = Template(with_template(tokenizer, plain)).chunks(talk("Hi", "Ho"))
    assert chunks == [("<s>user: Hi\nassistant:", False), (" Ho</s>", True), ("\n", False)]


def test_chatml_masks_up_to_its_own_end(tokenizer):
    other = with_template(tokenizer, CHATML)
    other.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    chunks = Template(other).chunks(talk("Hi", "Ho", system="S"))
    assert chunks[0] == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        False,
    )
    assert chunks[1:] == [("Ho<|im_end|>", True), ("\n", False)]


def test_prompt_is_what_training_showed(tokenizer):
    template = Template(tokenizer)
    ids, mask, _ = template.encode([talk("Where?", "There.")])[0]
    assert template.prompt(talk("Where?")) == [token for token, kept in zip(ids, mask, strict=True) if not kept]


@pytest.mark.parametrize("legacy", [False, True], ids=["today's file", "legacy file"])
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_servers_that_open_the_saved_tokenizer_ask_as_training_did(version, legacy, tmp_path):
    """They know only apply_chat_template: one question, several, with a system prompt, and awkward texts."""
    pytest.importorskip("mistral_common", reason="mistral-common is not installed: `make test` installs it")
    name = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}[version]
    bare = from_sentencepiece(f"{sys.modules['mistral_common'].__path__[0]}/data/{name}", legacy)
    bare.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(tmp_path / "base")
    save_tokenizer(tokenizer, tmp_path / "made")
    served, template = AutoTokenizer.from_pretrained(tmp_path / "made"), Template(tokenizer)
    for messages in conversations(24):
        asked = served.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert asked == template.prompt(messages[:-1]), messages
        assert served.apply_chat_template(messages)["input_ids"] == template.encode([messages])[0][0]
    assert not template.served_otherwise()


@pytest.mark.parametrize(
    ("jinja", "sentence"),
    [
        (MISTRAL_V1, ""),
        (OFFICIAL_V3, ""),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "writes a question and"),
        (OFFICIAL_V1, "writes a system prompt otherwise"),
    ],
    ids=["v1", "official v3", "no generation prompt", "official v1"],
)
def test_a_template_that_servers_render_otherwise_is_said_before_training(tokenizer, jinja, sentence):
    said = Template(with_template(tokenizer, jinja)).served_otherwise()
    assert sentence in said and bool(said) == bool(sentence)


def test_refused_roles_are_said(tokenizer):
    with pytest.raises(ValueError, match="does not take the roles user, user"):
        Template(tokenizer).chunks([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_pad_is_not_eos(tokenizer):
    assert tokenizer.pad_token == "<unk>"
    other = load_tokenizer(TINY)
    other.pad_token = other.eos_token
    assert pad_token(other) == "<unk>"
    other.add_special_tokens({"pad_token": "<pad>"})
    assert pad_token(other) == "<pad>"


def test_no_pad_token_is_refused():
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"</s>": 0, "a": 1}, [])), eos_token="</s>", name_or_path="bare"
    )
    with pytest.raises(ValueError, match="bare has no token to pad with but </s>"):
        pad_token(bare)


def test_missing_models_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="there is no model folder"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the tokenizer in .*empty cannot be read"):
        load_tokenizer(tmp_path / "empty")


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=40).map(str.strip)
TURN = TEXTS.filter(lambda text: text and not CONTROLS.search(text) and not any(c in text for c in "[<"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TURN, TURN), min_size=1, max_size=4), st.none() | TURN)
def test_trained_tokens_are_the_answers_and_their_ends(pairs, system):
    """Any conversation: what is trained decodes to exactly the assistant turns and their ends, and nothing else."""
    template = Template(load_tokenizer_once())
    messages = talk(*[text for pair in pairs for text in pair], system=system)
    ids, mask, _ = template.encode([messages])[0]
    assert trained_texts(template, ids, mask) == [f" {answer}</s>" for _, answer in pairs]
    untrained = [token for token, kept in zip(ids, mask, strict=True) if not kept]
    assert template.tokenizer.eos_token_id not in untrained


def load_tokenizer_once(cache={}):  # noqa: B006 - hypothesis cannot use fixtures of pytest
    return cache.setdefault("tiny", load_tokenizer(TINY))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TURN, TURN), min_size=1, max_size=5), st.none() | TURN, st.integers(8, 120))
def test_whole_turns_within_the_context(pairs, system, seq_len):
    template = Template(load_tokenizer_once())
    messages = talk(*[text for pair in pairs for text in pair], system=system)
    row = template.fit([messages], seq_len)[0]
    offset = int(system is not None)
    if not row.input_ids:
        first = template.encode([messages[: 2 + offset]])[0]
        assert len(first[0]) > seq_len
    else:
        kept = (len(row.messages) - offset) // 2
        assert len(row.input_ids) <= seq_len and sum(row.assistant_masks) > 0
        assert row.messages == messages[: len(row.messages)]
        assert (row.input_ids, row.assistant_masks) == template.encode([row.messages])[0][:2]
        if kept < len(pairs):  # not one more exchange would have fitted
            more = template.encode([messages[: len(row.messages) + 2]])[0][0]
            assert len(more) > seq_len


@settings(max_examples=40, deadline=None)
@given(TURN, st.integers(3, 20))
def test_plain_text_is_cut_and_not_lost(text, seq_len):
    template = Template(load_tokenizer_once())
    rows = template.fit_text(text, seq_len)
    ids = [token for row in rows for token in row.input_ids[1:]]
    assert template.tokenizer.decode(ids) in (text + "</s>", text)
    assert all(len(row.input_ids) <= seq_len and sum(row.assistant_masks) == len(row.input_ids) - 1 for row in rows)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tekken.json": "{}"}, "as tekken.json alone.*put the tokenizer.json"),
        ({"tokenizer.model": "no vocabulary"}, "cannot be read.*a folder needs tokenizer.json"),
        ({}, "cannot be read.*a folder needs tokenizer.json"),
    ],
)
def test_a_folder_without_a_tokenizer_that_can_be_read_says_which_file_is_wanted(files, says, tmp_path):
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says) as refusal:
        load_tokenizer(tmp_path)
    assert "network" not in str(refusal.value)

"""Do templates give the text that users expect, and the same ids in training and generation?"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.data import FieldConfig
from models.templates import TEMPLATES, encode_prompts, encode_responses, render
from sparse_zero.errors import InputError

FIELDS = FieldConfig()
RECORD = {"instruction": "Add {both}.", "input": "12 and 7", "output": "12 + 7 = 19.", "answer": "19"}
BARE = {**RECORD, "input": ""}


def test_alpaca_text_with_and_without_input(tiny_tokenizer):
    prompt, response = render("alpaca", RECORD, tiny_tokenizer, FIELDS)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {both}.\n\n### Input:\n12 and 7\n\n### Response:\n"
    )
    assert response == "12 + 7 = 19.</s>"
    prompt, _ = render("alpaca", BARE, tiny_tokenizer, FIELDS)
    assert "### Input" not in prompt
    assert prompt.startswith("Below is an instruction that describes a task. Write a response")
    assert prompt.endswith("### Instruction:\nAdd {both}.\n\n### Response:\n")


def test_alpaca_leaves_placeholders_in_a_record_alone(tiny_tokenizer):
    record = {**RECORD, "instruction": "Fill {input} and {instruction}", "input": "{instruction} {0}"}
    prompt, _ = render("alpaca", record, tiny_tokenizer, FIELDS)
    assert "### Instruction:\nFill {input} and {instruction}\n\n### Input:\n{instruction} {0}\n\n" in prompt


def test_plain_text(tiny_tokenizer):
    assert render("plain", BARE, tiny_tokenizer, FIELDS) == (
        "Question: Add {both}.\nAnswer:",
        " 12 + 7 = 19.</s>",
    )
    prompt, _ = render("plain", RECORD, tiny_tokenizer, FIELDS)
    assert prompt == "Question: Add {both}.\n12 and 7\nAnswer:"


def test_chat_is_the_tokenizers_own_template_cut_at_the_generation_prompt(tiny_tokenizer):
    prompt, response = render("chat", RECORD, tiny_tokenizer, FIELDS)
    assert prompt == "<s><|im_start|>user\nAdd {both}.\n\n12 and 7</s>\n<|im_start|>assistant\n"
    assert response == "12 + 7 = 19.</s>"  # without the line break that the template writes before the next turn


def test_chat_template_that_ends_without_eos_gets_one(train_tokenizer):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [/{{ m['role'] }}]{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    prompt, response = render("chat", BARE, train_tokenizer(chat_template=template), FIELDS)
    assert prompt == "[user] Add {both}. [/user][assistant]"
    assert response == " 12 + 7 = 19. [/assistant]</s>"


def test_plain_text_field_and_named_fields(tiny_tokenizer):
    assert render("alpaca", {"body": "Once."}, tiny_tokenizer, FieldConfig(text="body")) == ("", "Once.</s>")
    named = FieldConfig(instruction="question", input="context", output="reply")
    record = {"question": "Q", "context": "C", "reply": "R", "input": "not this"}
    assert render("plain", record, tiny_tokenizer, named) == ("Question: Q\nC\nAnswer:", " R</s>")


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("plain", {"eos": None}, "no end-of-sequence token.*set eos_token"),
        ("chat", {}, "no chat template.*alpaca or plain"),
        ("chat", {"chat_template": "{{ raise_exception('no user') }}"}, "chat template fails .no user"),
        ("chat", {"chat_template": "{{ messages[-1]['content'] }}"}, "cannot be told apart"),
        ("markdown", {}, "'markdown': choose one of alpaca, chat, plain"),
    ],
)
def test_unusable_tokenizers_are_named_errors(train_tokenizer, template, arguments, message):
    with pytest.raises(InputError, match=message):
        render(template, RECORD, train_tokenizer(**arguments), FIELDS)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_prompt_has_one_bos_where_wanted_and_no_eos(train_tokenizer, tiny_tokenizer, template, adds_bos, adds_eos):
    tokenizer = train_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos, chat_template=tiny_tokenizer.chat_template)
    prompt, response = render(template, RECORD, tokenizer, FIELDS)
    (prompt_ids,) = encode_prompts(tokenizer, [prompt], template)
    (response_ids,) = encode_responses(tokenizer, [response])
    has_bos = adds_bos or template == "chat"
    assert prompt_ids.count(tokenizer.bos_token_id) == has_bos
    assert (prompt_ids[0] == tokenizer.bos_token_id) == has_bos
    assert prompt_ids[-1] != tokenizer.eos_token_id
    assert response_ids.count(tokenizer.eos_token_id) == 1
    assert response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.bos_token_id not in response_ids


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("kind", ["tiny_tokenizer", "sentencepiece_tokenizer"])
def test_concatenated_ids_are_those_of_the_whole_text(request, template, kind):
    tokenizer = request.getfixturevalue(kind)
    prompt, response = render(template, RECORD, tokenizer, FIELDS)
    ids = encode_prompts(tokenizer, [prompt], template)[0] + encode_responses(tokenizer, [response])[0]
    assert ids == tokenizer(prompt + response)["input_ids"]


def test_sentencepiece_response_does_not_gain_a_space(sentencepiece_tokenizer):
    naive = sentencepiece_tokenizer("12 + 7</s>", add_special_tokens=False)["input_ids"]
    (ids,) = encode_responses(sentencepiece_tokenizer, ["12 + 7</s>"])
    pieces = sentencepiece_tokenizer.convert_ids_to_tokens(ids)
    assert sentencepiece_tokenizer.convert_ids_to_tokens(naive)[0].startswith("▁")
    assert pieces[0] == "1"
    assert pieces[-1] == "</s>"
    assert encode_responses(sentencepiece_tokenizer, ["12 + 7</s>"], follows_prompt=False) == [naive]


@settings(deadline=None, max_examples=60)
@example(texts=["\n12", "\n\n", " a"])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=3))
def test_any_response_comes_back_from_its_ids(tiny_tokenizer, texts):
    for text, ids in zip(texts, encode_responses(tiny_tokenizer, texts), strict=True):
        assert tiny_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_no_texts_have_no_ids(tiny_tokenizer):
    assert encode_prompts(tiny_tokenizer, [], "plain") == []
    assert encode_responses(tiny_tokenizer, []) == []

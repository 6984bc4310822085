import pytest
from openrlhf.datasets.prompts_dataset import preprocess_data

from openrlhf_alp.data.templates import TEMPLATES, PromptTemplate

LATEX = r"Let $f(x) = \{x\}$ and {problem} be 100% {} of $a_{1}$. Find $f(\frac{1}{2})$."


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_problem_with_braces_and_dollars_comes_through_unchanged(template):
    rendered = template.render(LATEX)
    last = rendered[-1]["content"] if template.is_chat else rendered
    assert last.count(LATEX) == 1


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_prompt_but_the_bare_one_asks_for_a_box(template):
    text = str(template.render("What is 3 + 4?"))
    assert ("boxed" in text) == (template.name != "chat-bare")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_only_tool_integrated_prompts_speak_of_code_and_show_both_fences(template):
    text = str(template.render("What is 3 + 4?"))
    assert ("```python" in text) == ("```output" in text) == template.is_tool_integrated
    assert ("--tir.template" in template.train_flags) == template.is_tool_integrated


def test_the_block_that_a_tool_prompt_shows_prints_what_the_prompt_says(capsys):
    text = TEMPLATES["base-tir"].render("What is 3 + 4?")
    code = text.split("```python\n")[1].split("```")[0]
    output = text.split("```output\n")[1].split("```")[0]
    exec(code, {})
    assert capsys.readouterr().out == output


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_openrlhf_reads_each_form_with_the_flags_that_go_with_it(template):
    """OpenRLHF hands messages to the chat template and passes a text on as it is."""

    def chat_template(chat, *, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in chat) + "<assistant>"

    row = {"input": template.render("What is 3 + 4?"), "label": "7"}
    applied = chat_template if "--data.apply_chat_template" in template.train_flags else None
    prompt, label = preprocess_data(
        row, input_key="input", label_key="label", apply_chat_template=applied
    )
    assert label == "7"
    if template.is_chat:
        assert prompt.endswith("<user>What is 3 + 4?<assistant>")
        assert prompt.startswith("<system>") == (template.system is not None)
    else:
        assert prompt == row["input"]


def test_a_text_with_a_system_message_is_refused():
    with pytest.raises(ValueError, match="only a chat has a system message"):
        PromptTemplate(
            name="odd", summary="", is_chat=False, is_tool_integrated=False, system="You are"
        )

"""The page on models says what the code does: its Python runs, its errors are the code's."""

import re
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lab.cli import COMMANDS
from dpo_lab.models import load_tokenizer
from dpo_lab.preferences import from_rows

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_the_python_of_the_page_runs_on_any_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    training = next(code for code in snippets if 'name = "embedded"' in code)
    messages = next(code for code in snippets if '"role"' in code)

    # as pasted, but for the name of the model
    names = {}
    exec(training.replace('name = "embedded"', f"name = {str(tiny)!r}"), names)
    assert names["metrics"][0]["loss"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "my-policy")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "runs" / "my-policy")) == 512

    exec(messages, names)
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = TURNS
    assert from_rows(names["rows"], tokenizer, context=64).report.pairs == 1


def test_the_commands_and_errors_of_the_page_are_those_of_the_code():
    assert set(re.findall(r"dpo-lab (\w+)", PAGE)) <= set(COMMANDS)

    # the errors of the code, each on one line
    source = "".join(path.read_text() for path in sorted((ROOT / "dpo_lab").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)

    table = PAGE.split("## When a model is refused")[1].split("## ")[0]
    rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    for row in rows:
        for part in re.split(r" N\b| 1 |BertForMaskedLM|, ", row):
            assert part.strip() in source, part
    assert len(rows) == 15

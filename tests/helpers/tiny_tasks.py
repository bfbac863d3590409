"""Small tasks for lm-evaluation-harness."""

import json
from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_tasks"]


def write_tasks(folder: Path, texts: Sequence[str]) -> Path:
    """A task of each kind of lm-evaluation-harness, from JSONL files; `texts` are scored as a whole."""
    folder.mkdir()
    words = ["built", "closed", "dug", "sold"]
    samples = [{"text": f"The canal number {i} was", "words": words, "answer": i % 4} for i in range(6)]
    rolling = [{"text": text} for text in (*texts, "another one")]
    kinds = {
        "tiny_choice": (samples, 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\n'
                        'doc_to_choice: "{{words}}"\n', "acc"),
        "tiny_rolling": (rolling, 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n',
                         "bits_per_byte"),
        "tiny_answer": (samples, 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{words[0]}}"\n'
                        "generation_kwargs: {until: [e], max_gen_toks: 12}\n", "exact_match"),
    }  # fmt: skip
    for name, (lines, form, metric) in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"{head}{form}metric_list: [{{metric: {metric}}}]\n")
    return folder

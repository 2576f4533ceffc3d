"""What llama-quantize answers to all questions of the tests, as a table in a file, and what we answer to the same.

Run as a program, it asks llama.cpp anew and writes tests/data/mixtures.json; for that the peer of quantize_peer.py must
be there. The table keeps the tests of mixtures quick, and possible without the peer.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from converter.containers.gguf.mixing import Facts, Weight, Wishes, choose_types, fit, may_quantize
from converter.containers.gguf.mixture import MIXTURES
from converter.schemes import GGUF_TYPES
from quantize_peer import MODELS, Answer, Model, Quantizer, Question, library_folder

TABLE = Path(__file__).parent / "data" / "mixtures.json"
OURS = ("MXFP4", "NVFP4")  # file types that llama-quantize does not make
BY_NUMBER = {MIXTURES[name].number: name for name in GGUF_TYPES if name not in OURS}
WISHES = (
    {"output": "Q8_0"},
    {"embedding": "Q5_0"},
    {"output": "Q5_1", "embedding": "Q8_0"},
    {"pure": True},
    {"pure": True, "output": "Q8_0"},
    {"rules": (("ffn_down", "Q5_0"), ("token_embd", "F16"))},
    {"rules": ((r"blk\.[0-2]\.(attn_v|attn_qkv|ffn_down)", "Q8_0"), ("output", "BF16"))},
    {"rules": (("attn", "Q8_0"),), "output": "F16", "pure": True},
    {"rules": (("embd", "F32"),), "embedding": "Q8_0"},
)
WISHED_MODELS = ("dense", "grouped", "mixtral", "falcon", "ragged", "hybrid")
WISHED_TYPES = ("Q4_K_M", "Q3_K_M", "Q4_0", "IQ2_M", "IQ3_XXS", "MXFP4_MOE", "F16")


def questions() -> Iterator[Question]:
    """Every file type for every model, with and without an imatrix, then wishes for some of them."""
    for model in MODELS:
        for number in BY_NUMBER:
            for imatrix in (False, True):
                yield Question(model=model, number=number, imatrix=imatrix)
    for model in WISHED_MODELS:
        for type in WISHED_TYPES:
            plain = Question(model=model, number=MIXTURES[type].number, imatrix=True)
            for wish in WISHES:
                if "rules" not in wish or type != "F16":  # llama-quantize ignores rules there, and we do not
                    yield replace(plain, **wish)


def key(question: Question) -> str:
    """The question in words, its name in the table."""
    words = [question.model, BY_NUMBER[question.number], *(["imatrix"] if question.imatrix else [])]
    words += [f"output={question.output}"] if question.output else []
    words += [f"embedding={question.embedding}"] if question.embedding else []
    words += ["pure"] if question.pure else []
    return " ".join([*words, *(f"{pattern}={type}" for pattern, type in question.rules)])


def ours(question: Question) -> Answer:
    """Our answer: types by tensor, or the first tensor that needs importance where there is none."""
    model, mixture = MODELS[question.model], MIXTURES[BY_NUMBER[question.number]]
    shapes = {name: shape for name, shape in model.tensors() if len(shape) > 1}
    weights = {
        name: Weight(name=name, columns=shape[-1], matrices=shape[0] if len(shape) == 3 else 1)
        for name, shape in shapes.items()
        if may_quantize(name)
    }
    ruled = {name: [type for pattern, type in question.rules if re.search(pattern, name)] for name in weights}
    wishes = Wishes(
        output=question.output,
        embedding=question.embedding,
        pure=question.pure,
        types={name: types[0] for name, types in ruled.items() if types},
    )
    wanted = choose_types(mixture, weights.values(), facts(model, question.imatrix), wishes)
    types = {name: fit(wanted[name], weights[name].columns)[0] for name in wanted}
    demanding = [name for name, type in types.items() if mixture.demands_importance(name, type)]
    if demanding and not question.imatrix:
        return demanding[0]
    return {name: types.get(name, "F32") for name in shapes}


def facts(model: Model, imatrix: bool) -> Facts:
    return Facts(
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        experts=model.experts,
        imatrix=imatrix,
        architecture=model.architecture,
    )


def told(answer: Answer) -> Answer:
    """llama.cpp's answer without what goes without saying: vectors are F32, a refusal names a tensor."""
    if isinstance(answer, str):
        named = re.search(r"offending tensor: (\S+)", answer)
        return named[1] if named else answer
    return {name: type for name, type in answer.items() if not name.endswith("_norm.weight") or type != "F32"}


class Table:
    """Answers by question, each tensor's types run-length coded over the blocks and every such run kept once."""

    def __init__(self, source: str, runs: list[str], answers: dict[str, list[int] | str]) -> None:
        self.source, self.runs, self.answers = source, runs, answers

    @staticmethod
    def read() -> Table:
        content = json.loads(TABLE.read_text("utf-8"))
        return Table(content["source"], content["runs"], content["answers"])

    def write(self) -> None:
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in self.answers.items())
        runs = ",\n".join(f"  {json.dumps(run)}" for run in self.runs)
        TABLE.parent.mkdir(exist_ok=True)
        content = f'{{"source": {json.dumps(self.source)},\n"runs": [\n{runs}\n],\n"answers": {{\n{lines}\n}}}}\n'
        TABLE.write_text(content, "utf-8")

    def put(self, question: Question, answer: Answer) -> None:
        self.answers[key(question)] = answer if isinstance(answer, str) else self._coded(answer)

    def holds(self, question: Question, answer: Answer) -> bool:
        """Whether this is the answer that the table has."""
        kept = self.answers[key(question)]
        if isinstance(answer, str) or isinstance(kept, str):
            return answer == kept
        return _runs(answer) == [self.runs[number] for number in kept]

    def _coded(self, types: Mapping[str, str]) -> list[int]:
        for run in _runs(types):
            if run not in self.runs:
                self.runs.append(run)
        return [self.runs.index(run) for run in _runs(types)]


def _runs(types: Mapping[str, str]) -> list[str]:
    """For each kind of tensor, in the order of their names, its types from block to block: "4 Q6_K, 2 Q4_K"."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name, type in types.items():
        match = re.match(r"blk\.(\d+)\.(.*)", name)
        block, kind = (int(match[1]), match[2]) if match else (0, name)
        kinds.setdefault(kind.removesuffix(".weight"), []).append((block, type))
    coded = []
    for kind in sorted(kinds):
        lengths = [(len(list(group)), type) for type, group in groupby(type for _, type in sorted(kinds[kind]))]
        coded.append(", ".join(f"{length} {type}" for length, type in lengths))
    return coded


def version(folder: Path) -> str:
    """What the folder holds, in words."""
    return ", ".join(file.name for file in sorted(folder.glob("libllama.*so*")))


def main() -> None:
    folder = library_folder()
    if folder is None:
        sys.exit("no libllama here: make peers, or set HUBMILL_LLAMA_LIB")
    table = Table(version(folder), [], {})
    wrong = 0
    with Quantizer(folder) as peer:
        for question in questions():
            answer = told(peer.ask(question))
            table.put(question, answer)
            if ours(question) != answer:
                wrong += 1
                sys.stdout.write(f"{key(question)}: {answer if isinstance(answer, str) else ''} differs from ours\n")
    table.write()
    sys.stdout.write(f"{len(table.answers)} answers, {wrong} differ from ours\n")


if __name__ == "__main__":
    main()

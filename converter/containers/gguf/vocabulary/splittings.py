"""The ways of splitting text that llama.cpp has names for, as a table.

A byte-level BPE splits text before it merges, and a GGUF file names the way (`tokenizer.ggml.pre`) instead of
describing it. Each row says how tokenizer.json writes one down (`steps`), what llama.cpp does under that name where it
only comes near (`reads`), and the switches that come with the name. A step is a pattern of the tokenizers library's
regular expressions, each of whose matches is a piece of its own; later steps split the pieces of earlier ones.

Sources: llama.cpp, src/llama-vocab.cpp and src/unicode.cpp; tokenizer.json of the models named. Each row is held
against llama.cpp in tests/test_gguf_splittings.py, where `reads` must agree with it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

AFTER_BYTES = "after bytes: "  # of a step that sees bytes written as letters, for it stands behind ByteLevel

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
WORD = rf"{BEFORE}\p{{L}}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
PUNCTUATION = r"[\p{P}!-/:-@\[-`{-~]"
CJK = "[一-龥぀-ゟ゠-ヿ]+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN35 = (
    rf"{CONTRACTIONS}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
SEED_CODER = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
EXAONE_MOE = (
    rf"{CONTRACTIONS}|{BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
UFAKZEKA = rf"{WORD}|\p{{N}}|{REST}"
MINICPM5 = (THREE_DIGITS, rf"{CONTRACTIONS}|{WORD}|\p{{N}}+|{REST}")
SPACES = r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)"
JAIS2 = (
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{SPACES}|\s{{1,2}}(?!\S)|\s{{1}}"
)


def cased(upper: str, lower: str, behind: str, digits: str, rest: str) -> str:
    """A pattern that ends words before capitals: `upper` letters, then `lower` ones, with `behind` at the end."""
    return rf"{BEFORE}{upper}*{lower}+{behind}|{BEFORE}{upper}+{lower}*{behind}|{digits}|{rest}"


TEKKEN = cased(UPPER, LOWER, "", DIGIT, SLASH_REST)
GPT4O = cased(UPPER, LOWER, f"{CONTRACTIONS}?", THREE_DIGITS, SLASH_REST)
# llama.cpp takes every letter but a to z for upper case and every one but A to Z for lower; marks are no letters, but
# in the third.
NEAR_UPPER, NEAR_LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
NEAR_TEKKEN = cased(NEAR_UPPER, NEAR_LOWER, "", DIGIT, SLASH_REST)
NEAR_GPT4O = cased(NEAR_UPPER, NEAR_LOWER, f"{CONTRACTIONS}?", THREE_DIGITS, SLASH_REST)
MARKED_GPT4O = cased(r"[[\p{L}\p{M}]&&[^a-z]]", r"[[\p{L}\p{M}]&&[^A-Z]]", f"{CONTRACTIONS}?", THREE_DIGITS, SLASH_REST)
CASELESS_GPT4O = cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", f"{CONTRACTIONS}?", THREE_DIGITS, SLASH_REST)
CASELESS_YOUTU = cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", f"{CONTRACTIONS}?", DIGIT, SLASH_REST)
YOUTU = cased(UPPER, LOWER, f"{CONTRACTIONS}?", DIGIT, SLASH_REST)
SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + CJK
KIMI = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    rf"{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]*{CONTRACTIONS}?|\p{{N}}{{1,3}}|{REST}"
)
HAN = r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
NEAR_KIMI = rf"[{HAN}]+|{BEFORE}[\p{{L}}&&[^{HAN}]]+{CONTRACTIONS}?|\p{{N}}{{1,3}}|{REST}"
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*\b)"
FROM_THE_RIGHT_OF_ALL = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# llama.cpp leaves what stands before a number in one piece with its first digits.
NEAR_FROM_THE_RIGHT = r"[^\p{N}]*" + FROM_THE_RIGHT_OF_ALL

DEEPSEEK3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (THREE_DIGITS, CJK, DEEPSEEK3_WORDS)
SPARK = (THREE_DIGITS, CJK, DEEPSEEK3_WORDS.replace(r"+[\r\n]*|\s*[\r\n]+", r"+|[\r\n]"), DIGIT)
AFMOE_SCRIPTS = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{E40}-"
    r"\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
IDEOGRAPHS = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, DIGIT)
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽ"
    "ᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-"
    "Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{CASED_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    IDEOGRAPHS,
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
FALCON = (f"{PUNCTUATION}+", GPT2)
CHAMELEON = ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", DIGIT, PUNCTUATION, GPT2)
LAGUNA = (r"[^\n]+|[\n]+", QWEN2)
SUPERBPE = (DIGITS, r"(?=(\d{3})+(?!\d))")
NEAR_SUPERBPE = (DIGITS, "(?=([0-9]{3})+(?![0-9]))")
DEFAULT = (r"[\p{P}$+<=>^~|]+", GPT2, DIGITS, "[0-9][0-9][0-9]")


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How a reader that finds `name` splits text.

    steps: the patterns as tokenizer.json has them; reads: those that llama.cpp follows, the same where empty.
    whole_words: a piece that is a token is taken as it is, without merging. cleans: detokenizing removes the space
    before punctuation. families: model types that llama.cpp's own converter gives this name; among names that split
    alike it only decides what the file says.
    """

    name: str
    steps: tuple[str, ...]
    reads: tuple[str, ...] = ()
    whole_words: bool = False
    cleans: bool = False
    families: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether llama.cpp follows the steps to the letter."""
        return not self.reads


SPLITTINGS = (
    Splitting(name="qwen2", steps=(QWEN2,)),
    Splitting(name="stablelm2", steps=(QWEN2,), cleans=True, families=("stablelm", "stablelm_epoch")),
    Splitting(name="hunyuan", steps=(QWEN2,), families=("hunyuan", "hunyuan_v1_moe")),
    Splitting(name="solar-open", steps=(QWEN2,), families=("solar_open",)),
    Splitting(name="grok-2", steps=(QWEN2,), families=("grok",)),
    Splitting(name="bailingmoe", steps=(BAILING,)),
    Splitting(name="qwen35", steps=(QWEN35,)),
    Splitting(name="llama-bpe", steps=(LLAMA3,), whole_words=True, cleans=True),
    Splitting(name="lfm2", steps=(LLAMA3,), whole_words=True, cleans=True, families=("lfm2", "lfm2_moe", "lfm2_vl")),
    Splitting(name="glm4", steps=(LLAMA3,), whole_words=True, cleans=True, families=("glm4", "glm4_moe", "glm4v")),
    Splitting(name="dbrx", steps=(LLAMA3,), cleans=True),
    Splitting(name="smaug-bpe", steps=(LLAMA3,), cleans=True),
    Splitting(name="chatglm-bpe", steps=(LLAMA3,), cleans=True, families=("glm", "chatglm")),
    Splitting(name="jais-2", steps=(JAIS2,), cleans=True),
    Splitting(name="minicpm5", steps=MINICPM5, whole_words=True, cleans=True),
    Splitting(
        name="gpt-2", steps=(GPT2,), cleans=True, families=("gpt2", "gptj", "gpt_neo", "gpt_neox", "codegen", "opt")
    ),
    Splitting(name="olmo", steps=(GPT2,), cleans=True, families=("olmo", "olmoe")),
    Splitting(name="mpt", steps=(GPT2,), cleans=True, families=("mpt",)),
    Splitting(name="jais", steps=(GPT2,), cleans=True, families=("jais",)),
    Splitting(name="phi-2", steps=(GPT2,), cleans=True, families=("phi",)),
    Splitting(name="roberta-bpe", steps=(GPT2,), cleans=True, families=("roberta",)),
    Splitting(name="modern-bert", steps=(GPT2,), cleans=True, families=("modernbert",)),
    Splitting(name="trillion", steps=(GPT2,)),
    Splitting(name="granite-docling", steps=(GPT2,), families=("idefics3",)),
    Splitting(name="smollm", steps=(DIGIT, GPT2)),
    Splitting(name="command-r", steps=(DIGIT, GPT2), families=("cohere", "cohere2")),
    Splitting(name="starcoder", steps=(DIGIT, GPT2), cleans=True, families=("starcoder2", "gpt_bigcode")),
    Splitting(name="refact", steps=(DIGIT, GPT2), cleans=True, families=("granite", "granitemoe", "granitemoehybrid")),
    Splitting(name="codeshell", steps=(DIGIT, GPT2), cleans=True, families=("codeshell",)),
    Splitting(name="exaone", steps=(DIGIT, GPT2), cleans=True, families=("exaone",)),
    Splitting(name="tekken", steps=(TEKKEN,), reads=(NEAR_TEKKEN,), whole_words=True),
    Splitting(name="gpt-4o", steps=(GPT4O,), reads=(NEAR_GPT4O,)),
    Splitting(name="granite-embed-multi-97m", steps=(GPT4O,), reads=(MARKED_GPT4O,), whole_words=True),
    Splitting(name="tiny_aya", steps=(FROM_THE_RIGHT, GPT4O), reads=(NEAR_FROM_THE_RIGHT, CASELESS_GPT4O)),
    Splitting(name="kimi-k2", steps=(KIMI,), reads=(NEAR_KIMI,)),
    Splitting(name="youtu", steps=(SCRIPTS, YOUTU), reads=(SCRIPTS, CASELESS_YOUTU), whole_words=True),
    Splitting(name="seed-coder", steps=(SEED_CODER,)),
    Splitting(name="exaone-moe", steps=(EXAONE_MOE,), cleans=True),
    Splitting(name="ufakzeka", steps=(UFAKZEKA,)),
    Splitting(name="laguna", steps=LAGUNA),
    Splitting(name="superbpe", steps=SUPERBPE, reads=NEAR_SUPERBPE),
    Splitting(name="deepseek-v3", steps=DEEPSEEK3),
    Splitting(name="hunyuan-dense", steps=DEEPSEEK3, families=("hunyuan_v1_dense",)),
    Splitting(name="spark2_5", steps=SPARK),
    Splitting(
        name="afmoe",
        steps=(FROM_THE_RIGHT_OF_ALL, AFMOE_SCRIPTS, DEEPSEEK3_WORDS),
        reads=(NEAR_FROM_THE_RIGHT, AFMOE_SCRIPTS, DEEPSEEK3_WORDS),
    ),
    Splitting(name="deepseek-coder", steps=DEEPSEEK_CODER),
    Splitting(name="deepseek-llm", steps=(*DEEPSEEK_LLM, DIGIT), reads=(*DEEPSEEK_LLM, DIGITS)),
    Splitting(name="bloom", steps=(BLOOM,), cleans=True),
    Splitting(name="poro-chat", steps=(BLOOM,)),
    Splitting(name="viking", steps=(BLOOM, DIGIT)),
    Splitting(
        name="falcon",
        steps=(*FALCON, AFTER_BYTES + DIGITS, AFTER_BYTES + "[0-9][0-9][0-9]"),
        reads=(*FALCON, "[0-9][0-9][0-9]"),
        cleans=True,
    ),
    Splitting(name="chameleon", steps=CHAMELEON),
    Splitting(name="default", steps=DEFAULT, cleans=True),
)

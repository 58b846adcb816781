"""Names that PEFT's files use for methods and tasks, and the errors and warnings of configurations."""

from __future__ import annotations

import enum
import warnings


class PeftType(str, enum.Enum):
    """Every adapter type that PEFT's files can name; `methods.registry.registry()` has those that exist here."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


def peft_type(value: PeftType | str | None) -> PeftType:
    """The type that a name means; ValueError for a name that PEFT does not have."""
    try:
        return PeftType(value)
    except ValueError:
        raise ValueError(f"Unknown PEFT type: {value!r}") from None


class TaskType(str, enum.Enum):
    """The task of the adapted model, which chooses the PeftModel class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


SEQ_CLS_HEADS = ("score", "classifier")  # names of the heads of models for sequence classification


class PeftError(ValueError):
    """Base of the errors that a wrong configuration or model causes."""


class NoMatchingPeftModuleError(PeftError):
    """No module of the model is one that the configuration targets."""


class MergeError(ValueError, RuntimeError):
    """Adapters that cannot be merged into a layer. PEFT raises now the one error, now the other."""


class GroupsError(ValueError, NotImplementedError):
    """A convolution in groups, for a method that has no form for one. PEFT raises NotImplementedError."""


class UnmixableError(ValueError, TypeError):
    """A layer that cannot serve rows with adapters of their own. PEFT raises now the one error, now the other."""


class PeftWarning(UserWarning):
    """Something was ignored or changed that the user should know of."""


class PeftRuntimeWarning(PeftWarning, RuntimeWarning):
    """A PeftWarning where PEFT gives a RuntimeWarning."""


def warn(message: str, level: int = 1, category: type[PeftWarning] = PeftWarning) -> None:
    """A PeftWarning. level: 1 where it is about the call of the caller, 2 where about the call before that."""
    warnings.warn(message, category, stacklevel=level + 2)

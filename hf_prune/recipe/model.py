"""What all parts of a recipe are: strict, frozen, and of finite plain values."""

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A part of a recipe. An unknown key is an error; docstrings of fields are their help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, strict=True
    )

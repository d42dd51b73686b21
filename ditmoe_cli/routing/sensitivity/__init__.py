"""How much predictions change where a part of a block is left out, by block and step."""

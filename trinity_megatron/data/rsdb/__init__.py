"""The random sequential document buffer: documents mixed within a sequence, none cut or lost."""

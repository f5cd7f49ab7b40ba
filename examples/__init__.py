"""Examples of unigrpo, which `unigrpo examples` lists and copies."""

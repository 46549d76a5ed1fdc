"""Operations in C, with torch as the reference."""

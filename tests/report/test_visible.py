import os

from openrlhf_alp.report.visible import visible


def test_what_has_no_shape_becomes_a_sign_and_words_stay():
    assert visible("Größe 数学 a=1") == "Größe 数学 a=1"
    assert visible("a\nb\u202ec\u2028d\x1b[31m") == "a<U+000A>b<U+202E>c<U+2028>d<U+001B>[31m"
    assert visible(os.fsdecode(b"bad\xff")) == "bad\\xff"
    assert visible("half \ud800") == "half <U+D800>"

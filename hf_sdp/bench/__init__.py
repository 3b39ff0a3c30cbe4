"""Measuring tools and pictures. The core never imports them; they need the extra ``hf_sdp[bench]``.

Its modules are imported without the extra, except ``picture`` and ``quality.plots``, which draw.
"""

"""`hypergen passport`: how far the images of an export are from those of its checkpoint in float32.

Both are generated through a real Triton, so what is measured is what is served.
"""

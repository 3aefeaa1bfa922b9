#!/bin/sh
# NVIDIA's prints banners and warnings before it becomes the command.
exec "$@"

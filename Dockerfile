# The demo, and a server of its run, as a user who is not root. On a CPU: torch comes without CUDA.
#
#   docker build --tag tunesmith .
#   docker run --rm --volume tunesmith:/home/tunesmith tunesmith
#   docker run --rm --volume tunesmith:/home/tunesmith --publish 127.0.0.1:8000:8000 \
#     tunesmith serve runs/demo-1 --host 0.0.0.0
#
# The volume holds runs, the model, and the keys of the server, which prints one at its first start.
FROM python:3.12-slim

# compiles the CPU kernels, once, at first use
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN pip install --no-cache-dir '/source[serve]'

RUN useradd --create-home --uid 1000 tunesmith
USER tunesmith
WORKDIR /home/tunesmith
EXPOSE 8000
ENTRYPOINT ["tunesmith"]
CMD ["demo"]

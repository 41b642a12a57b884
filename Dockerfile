# docker build -t dalle . && docker run --rm -v "$PWD/logs:/app/logs" dalle train.py model=clip
# With a GPU: docker run --gpus all --shm-size 8g ...
FROM python:3.11-slim
WORKDIR /app
# Dependencies first: they change less often than the code.
COPY pyproject.toml constraints.txt README.md ./
COPY src/dalle/__init__.py src/dalle/__init__.py
COPY conf conf
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[wandb,sweeps]"
COPY . .
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]

"""Chat templates in the manner of well-known families: short imitations, each with its quirks."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Tools as JSON in the system's turn, arguments by tojson, results wrapped in a user's turn.
QWEN2 = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{% else %}{{- 'Be helpful.' }}\
{% endif %}
{{- '\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and \
not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\\n' + m.content }}{% endif %}
{%- for call in m.tool_calls %}
{%- if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}
{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

# Thoughts stay after the last question alone; the last answer has some, be they empty.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- if content or not loop.first %}{{- '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{% endif %}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# Begins with its own BOS and a system's turn, trims, one call a turn, results as JSON.
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set s = messages[0].content | trim %}\
{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none and tools is defined %}{{- 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\n\\n' + s + '<|eot_id|>' }}
{%- if tools %}
{%- set first = messages[0].content | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nFunctions:\\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{% endfor %}
{{- first + '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}
{%- if not m.tool_calls | length == 1 %}{{- raise_exception('one tool-call at once') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
{{- '"parameters": ' }}{{- call.arguments | tojson }}{{- '}' + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
{%- else %}{{- m.content }}{% endif %}
{{- '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# No generation prompt; tools before the last question alone; ids of nine letters.
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set loop_messages = \
messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}
{%- set users = loop_messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in loop_messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}
{{- '[AVAILABLE_TOOLS]' + (tools | map(attribute='function') | list | tojson) }}
{{- '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and s is defined %}{{- '[INST]' + s + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{% endif %}
{%- elif m.tool_calls is defined and m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception('ids of nine characters') }}{% endif %}
{%- set out = call.function | tojson %}
{{- out[:-1] + ', "id": "' + call.id + '"}' }}{{- ', ' if not loop.last else '' }}
{%- endfor %}{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + (m.content | string) + ', "call_id": "' }}
{{- m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

# Another name for the assistant, no system, strict alternation.
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

PHI = """\
{%- for m in messages %}
{%- if m.role == 'system' and m.content %}{{- '<|system|>\\n' + m.content + '<|end|>\\n' }}
{%- elif m.role == 'user' %}{{- '<|user|>\\n' + m.content + '<|end|>\\n' }}
{%- elif m.role == 'assistant' %}{{- '<|assistant|>\\n' + m.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

# Arguments are text that is joined to other text; a content is wanted beside a call.
DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<User>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<Assistant>' + m['content'] }}
{%- for call in m.tool_calls %}
{{- '<call>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] }}
{{- '\\n```</call>' }}
{%- endfor %}{{- '<end>' }}
{%- elif m.role == 'tool' %}{{- '<output>' + m.content + '</output>' }}
{%- else %}{{- '<Assistant>' + m.content + '<end>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant>' }}{% endif %}"""

# Every argument by itself, which asks for a mapping.
ITEMS = """\
{%- for m in messages %}
{{- '<' + m.role + '>' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name }}
{%- for k, v in call.function.arguments | items %}{{- '<' ~ k ~ '=' ~ v ~ '>' }}{% endfor %}
{%- endfor %}{{- '</>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}"""

# A content is a list of parts, and nothing else.
PARTS = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>' }}
{%- for part in m.content %}{% if part.type == 'text' %}{{- part.text }}{% endif %}{% endfor %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""

# Asks for a thought, which it does not write before an answer that others follow.
THINKING = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{{- '<A>' }}
{%- if loop.last %}{{- '<think>\\n' + (m.reasoning_content or '') + '</think>' }}{% endif %}
{{- m.content + '<end>' }}
{%- else %}{{- '<U>' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<A><think>\\n' }}{% endif %}"""

ALL = {
    "chatml": CHATML,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "deepseek": DEEPSEEK,
    "items": ITEMS,
    "parts": PARTS,
}
CALLING = {name: ALL[name] for name in ("qwen2", "qwen3", "llama3", "mistral", "deepseek", "items")}
